# The image of this project, on Ray's own of the version that constraints.txt pins. It runs as user 1000, not as root.
#
#   docker build -t rayjobs .                              # CUDA; rayjobs/configs/cluster/kuberay.yaml takes this one
#   docker build -t rayjobs --build-arg DEVICE=cpu .       # without CUDA
#   docker run --name demo --shm-size=4g rayjobs rayjobs demo              # with GPUs: --gpus all
#   docker cp demo:/home/ray/rayjobs/runs . && docker rm demo              # its runs and their reports
#
# PyTorch out of the package index holds its CUDA libraries in either, and what is installed takes 6 GB. With
# PIP_EXTRA_INDEX_URL as a build argument, pip also looks in another index, such as PyTorch's of builds for the CPU.
ARG DEVICE=gpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}
ARG PIP_EXTRA_INDEX_URL=
USER 1000
# What the project needs is a layer of its own, so that an edit of the code does not install several gigabytes again.
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE /home/ray/rayjobs/
WORKDIR /home/ray/rayjobs
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[demo,s3,gs]'
COPY --chown=ray:users . .
RUN pip install --no-cache-dir --no-deps --editable .
CMD ["rayjobs", "--help"]
