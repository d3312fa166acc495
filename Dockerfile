# The image of this project, on Ray's own of the version that constraints.txt pins. It runs as user 1000, not as root.
#
#   docker build -t rayjobs .                              # CUDA; rayjobs/configs/cluster/kuberay.yaml takes this one
#   docker build -t rayjobs --build-arg DEVICE=cpu .       # without CUDA
#   docker run --rm --shm-size=4g rayjobs rayjobs demo
#
# PyTorch out of the package index holds its CUDA libraries in either; with PIP_EXTRA_INDEX_URL as a build argument, pip
# also looks in another index, such as that of PyTorch's builds for the CPU.
ARG DEVICE=gpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}
ARG PIP_EXTRA_INDEX_URL=
USER 1000
COPY --chown=ray:users . /home/ray/rayjobs
WORKDIR /home/ray/rayjobs
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[demo,s3,gs]'
CMD ["rayjobs", "--help"]
