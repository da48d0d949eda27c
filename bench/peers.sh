#!/usr/bin/env bash
# Fetches FlashInfer and what it imports as wheels into .peers/ (12 MB), for a GPU machine that has
# torch and nvcc but no network; FlashInfer compiles its kernels there at their first use. There:
#     pip install --no-index --no-deps --target PEERS .peers/*.whl && export PYTHONPATH=PEERS
# An argument names the Python there, by default 3.12. Version 0.5.3, because its wheel has 7 MB,
# where 0.7.2's has 62, and imports without CUTLASS's DSL, which has hundreds.
set -euo pipefail
cd "$(dirname "$0")/.."
pip download --no-deps --only-binary=:all: --dest .peers \
  --python-version "${1:-3.12}" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  flashinfer-python==0.5.3 apache-tvm-ffi==0.1.15.post2 einops tabulate requests \
  click nvidia-ml-py tqdm packaging charset-normalizer idna urllib3 certifi typing-extensions
