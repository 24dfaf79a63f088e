# telescope in a container; docs/containers.md says how to build and run it.
#   docker build --tag telescope .                     CUDA: torch as the package index has it for Linux
#   docker build --tag telescope --build-arg TORCH_INDEX=URL .   CPU: PyTorch's own index of CPU builds
# torch brings CUDA's libraries along, so both have the same base; a GPU needs the host's driver alone.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY telescope telescope
COPY models models
COPY sweeps sweeps
# ray[default] has what KubeRay asks a node for: its dashboard and its health.
RUN python -m venv /opt/telescope \
 && /opt/telescope/bin/pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[postgres]" "ray[default]"

FROM ${BASE}
# A C++ compiler for torch.compile; wget for KubeRay's probes.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 telescope \
 && install --directory --owner telescope /work
COPY --from=build /opt/telescope /opt/telescope
ENV PATH=/opt/telescope/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER telescope
WORKDIR /work
ENTRYPOINT ["telescope"]
CMD ["--help"]
