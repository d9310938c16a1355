# Prediction with exported detectors, without PyTorch: docker build -f containers/predict.Dockerfile -t recontrast-predict .
# docker run --rm -v "$PWD:/work" recontrast-predict predict detector.onnx photos --out results
FROM python:3.12-slim
COPY pyproject.toml setup.py CMakeLists.txt README.md LICENSE /source/
COPY csrc /source/csrc
COPY kernels /source/kernels
COPY recontrast /source/recontrast
RUN RECONTRAST_BUILD=python pip install --no-cache-dir --no-deps /source \
    && pip install --no-cache-dir numpy pillow scipy onnxruntime typer rich pyyaml filelock \
    && rm -rf /source && useradd --create-home operator
USER operator
WORKDIR /work
ENTRYPOINT ["recontrast"]
