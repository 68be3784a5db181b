# A job of managed training: Vertex AI custom jobs, SageMaker, Huawei ModelArts. Build at the top of the repository:
#   docker build -f tools/deploy/train.Dockerfile -t gptjax-train .                       # EXTRAS=tpu,gcs for TPUs
# Arguments of the job: --config=configs/gpt2_124m.py -- --config.data.source='text:{input:training}/*.txt'
FROM python:3.12-slim
ARG EXTRAS=cuda,gcs,s3
WORKDIR /app
COPY pyproject.toml README.md ./
COPY gptjax gptjax
COPY constraints constraints
RUN pip install --no-cache-dir --constraint constraints/python3.12.txt ".[${EXTRAS}]"
COPY configs configs
# SageMaker and ModelArts mount their folders for their own users, so the user is the service's.
ENTRYPOINT ["gptjax", "launch", "managed"]
