# megatron_ttt on NVIDIA's PyTorch image, whose torch, CUDA, NCCL and Transformer Engine were built
# for each other. They stay as they are: the extra `gpu` would put a second Transformer Engine over
# the image's, so it is not installed here.
#
#   docker build --build-arg BASE=REGISTRY/nvidia/pytorch:YY.MM-py3 -t megatron_ttt .
#   docker run --gpus all --ipc host -v "$PWD/outputs:/work/outputs" megatron_ttt
#
# BASE: an image with Python 3.12 (the versions of everything else are pinned for it) and torch 2.6
# or newer; torch 2.13 attends to documents without masks.
ARG BASE
FROM ${BASE}

WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY megatron_ttt megatron_ttt
RUN set -eu; \
    own='^(torch|torchvision|triton|transformer[-_]engine|numpy|nvidia|cuda)'; \
    pip list --format=freeze | grep -iE "$own" > /tmp/image.txt; \
    grep -ivE "$own" constraints/3.12.txt > /tmp/ours.txt; \
    pip install --no-cache-dir -c /tmp/image.txt -c /tmp/ours.txt -e '.[dev,hf,eval]'

COPY . .
ENV OMP_NUM_THREADS=1
CMD ["python", "tools/gpu_trial.py"]
