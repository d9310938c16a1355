# Training and everything else: docker build -f containers/train.Dockerfile -t recontrast .
# docker run --rm --gpus all -v "$PWD:/work" recontrast train mine --budget 3m
# For a CPU alone, add --build-arg TORCH_INDEX=--index-url=URL with the index of PyTorch's CPU builds.
FROM python:3.12-slim
ARG TORCH_INDEX=
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir $TORCH_INDEX torch
COPY pyproject.toml setup.py CMakeLists.txt README.md LICENSE /source/
COPY csrc /source/csrc
COPY kernels /source/kernels
COPY recontrast /source/recontrast
RUN pip install --no-cache-dir '/source[export,tiles]' && rm -rf /source && useradd --create-home operator
USER operator
WORKDIR /work
ENTRYPOINT ["recontrast"]
