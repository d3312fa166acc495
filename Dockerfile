# The image that rayjobs/configs/cluster/kuberay.yaml names: Ray's own, with this project in its working folder.
FROM rayproject/ray:2.60.0-py311-gpu
COPY --chown=ray:users . /home/ray/rayjobs
WORKDIR /home/ray/rayjobs
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[s3,gs]'
