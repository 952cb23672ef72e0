# What a collection runs in: CUDA with its compiler (FlashInfer compiles kernels when it runs),
# SGLang, FlashInfer, and this project. Build it from the repository's root:
#
#     docker build --file docker/worker.Dockerfile --tag onboard-worker:VERSION .
#
# SGLang needs the CUDA of its torch, and pins the FlashInfer that it works with: change
# SGLANG_VERSION alone, unless you know of another pair.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE_IMAGE}

ARG DEBIAN_FRONTEND=noninteractive
ARG SYSTEM_PACKAGES="ca-certificates g++ libnuma1 libseccomp2 python3-dev python3-venv"
RUN dpkg --status ${SYSTEM_PACKAGES} > /dev/null 2>&1 || ( \
        apt-get update \
        && apt-get install --yes --no-install-recommends ${SYSTEM_PACKAGES} \
        && rm -rf /var/lib/apt/lists/* )

# Not 1000, which Ubuntu's images have given away. Folders that are mounted belong to this user.
ARG USER_ID=10001
RUN useradd --uid ${USER_ID} --create-home --no-log-init onboard \
    && install --directory --owner onboard /home/onboard/.cache

# Dependencies before code: a change of the code rebuilds only what follows its COPY.
ENV PATH=/opt/venv/bin:${PATH}
WORKDIR /opt/app
COPY pyproject.toml docker/requirements.py ./
ARG EXTRAS=bench,gpu
ARG SGLANG_VERSION=0.5.17
ARG FLASHINFER_VERSION
ARG PIP_NO_INDEX
RUN python3 -m venv /opt/venv \
    && python3 requirements.py pyproject.toml "${EXTRAS}" \
        sglang==${SGLANG_VERSION} flashinfer-python==${FLASHINFER_VERSION} > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check --requirement requirements.txt

COPY README.md LICENSE ./
COPY tasks tasks
COPY flows flows
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
        --editable .

# Kernels that FlashInfer, Triton and TVM-FFI compile go to ~/.cache, which outlives a container
# where a folder of the host is mounted there.
ENV PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    CUDA_HOME=/usr/local/cuda \
    TRITON_CACHE_DIR=/home/onboard/.cache/triton \
    PREFECT_HOME=/home/onboard/.prefect \
    PREFECT_SERVER_EPHEMERAL_ENABLED=false \
    DO_NOT_TRACK=1
USER onboard
# No GPU is needed to start: an image that cannot is not finished.
RUN onboard --help > /dev/null && prefect version > /dev/null && python -c "import flows.collect"
CMD ["onboard", "--help"]
