"""CaFo: prompt, generate, then cache (arXiv 2303.02151). PyTorch and open_clip.

datasets, fewshot    images and labels, and the K-shot choice            images → encoders → unit features
prompt               sentences → CLIP's zero-shot classifier W
generate             drawn images, the best K' by CLIP
cache, ensemble      keys and values → p_ZS + α · term (eq. 3-9), and the training of the keys
search               α, β and the ensemble's weights, exactly, on validation features
"""
