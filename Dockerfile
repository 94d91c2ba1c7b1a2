# A machine that trains, in a box. On a CPU:
#     docker build -t private-adapters .
# With CUDA (PyTorch's wheels on PyPI bring it; the host needs the NVIDIA container toolkit):
#     docker build -t private-adapters --build-arg TORCH_INDEX=https://pypi.org/simple .
# Images and results stay outside, and belong to you:
#     docker run --rm -it --user "$(id -u):$(id -g)" -v /data/scans:/scans:ro -v "$PWD/runs:/app/runs" \
#         private-adapters python train_dp_lora.py --train_data_dir /scans --output_dir runs/scans ...
# (with `--gpus all` after `run` on CUDA). Only what .dockerignore names is copied into the image, and
# no folder of pictures, unless it lies in one of those.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -r requirements.txt
COPY . .
# Caches and the memory of ledgers lie beside the results: a container's own disk is forgotten.
ENV HF_HOME=/app/runs/huggingface XDG_STATE_HOME=/app/runs/state MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1
CMD ["python", "train_dp_lora.py", "--help"]
