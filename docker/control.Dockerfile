# What everything else runs in: flows that need no GPU, and the Prefect workers, of which the one
# for the gpu pool only starts containers. Build it from the repository's root:
#
#     docker build --file docker/control.Dockerfile --tag onboard-control:VERSION .
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# libseccomp is the jail that models' and definitions' code runs in.
ARG DEBIAN_FRONTEND=noninteractive
ARG SYSTEM_PACKAGES="ca-certificates git libseccomp2"
RUN dpkg --status ${SYSTEM_PACKAGES} > /dev/null 2>&1 || ( \
        apt-get update \
        && apt-get install --yes --no-install-recommends ${SYSTEM_PACKAGES} \
        && rm -rf /var/lib/apt/lists/* )

# The worker image's user: both write to the same folders.
ARG USER_ID=10001
RUN useradd --uid ${USER_ID} --create-home --no-log-init onboard

# Dependencies before code: a change of the code rebuilds only what follows its COPY.
ENV PATH=/opt/venv/bin:${PATH}
WORKDIR /opt/app
COPY pyproject.toml constraints.txt docker/requirements.py ./
ARG EXTRAS=bench,server
# Index of a torch without CUDA, which is much smaller.
ARG TORCH_INDEX
ARG PIP_NO_INDEX
RUN python3 -m venv /opt/venv \
    && python3 requirements.py pyproject.toml "${EXTRAS}" > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY tasks tasks
COPY flows flows
COPY prefect.yaml ./
COPY deployments deployments
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
        --editable .

ENV PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PREFECT_HOME=/home/onboard/.prefect \
    PREFECT_SERVER_EPHEMERAL_ENABLED=false \
    DO_NOT_TRACK=1
USER onboard
RUN onboard --help > /dev/null && prefect version > /dev/null && git --version > /dev/null
CMD ["onboard", "--help"]
