# Two images from one file:
#   docker build --target gpu -t sora_train .          docker run --gpus all --shm-size 16g sora_train python -m sora_train.doctor
#   docker build --target cpu -t sora_train:cpu .      docker run sora_train:cpu        (runs the tests)
#
# Both install the versions in constraints.txt into /opt/venv and run as the user "sora" (10001). Mount a folder at
# /app/runs that this user may write to, to keep what a run writes.

# ---- gpu: a devel image, since DeepSpeed compiles with nvcc. Its CUDA must have the major version of PyTorch's.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE} AS gpu

RUN apt-get update \
    && apt-get install -y --no-install-recommends git g++ python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
# An active environment is what the launch scripts use.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt ./
RUN pip install -c constraints.txt torch setuptools wheel ninja numpy packaging psutil py-cpuinfo
# Built here, so that no process compiles at its start. cpu_adam is for optimizer offload, and is compiled for the
# processor that builds the image: build on the oldest kind in the cluster.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0+PTX"
RUN DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
    pip install --no-build-isolation -c constraints.txt deepspeed

COPY . .
RUN pip install -c constraints.txt -e '.[dev,models,dash,eval,storage]'
# Anything that is still compiled at run time goes where this user may write and no other job looks.
RUN useradd --uid 10001 --create-home sora && mkdir -p runs && chown -R sora /app
USER 10001
ENV TORCH_EXTENSIONS_DIR=/home/sora/torch_extensions
# That the container is fit to train; the GPU is left alone, because its memory is the run's.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "python", "-m", "sora_train.doctor"]
CMD ["python", "-m", "sora_train.doctor"]

# ---- cpu: small, for continuous integration.
FROM python:3.11-slim-bookworm AS cpu

RUN apt-get update \
    && apt-get install -y --no-install-recommends git g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt ./
RUN pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
RUN pip install -c constraints.txt setuptools wheel ninja numpy packaging psutil py-cpuinfo
# The one op that DeepSpeed needs on a CPU; see launch/setup.sh.
RUN DS_BUILD_SHM_COMM=1 pip install --no-build-isolation -c constraints.txt deepspeed

COPY . .
RUN pip install -c constraints.txt -e '.[dev,dash,eval,models,docs,curate,release,serve]'
RUN useradd --uid 10001 --create-home sora && mkdir -p runs && chown -R sora /app
USER 10001
ENV TORCH_EXTENSIONS_DIR=/home/sora/torch_extensions
# That the container is fit to train; the GPU is left alone, because its memory is the run's.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "python", "-m", "sora_train.doctor"]
# What launch/test.sh runs, in the environment made above.
CMD ["bash", "-c", "ruff check . && mypy && pytest -q"]
