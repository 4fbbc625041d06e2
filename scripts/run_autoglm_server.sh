#!/bin/sh
# Serve a compressed checkpoint with vLLM on two GPUs, by the name that AutoGLM's phone agent asks for:
#   scripts/run_autoglm_server.sh runs/autoglm-phone-9b/int4 [more options of autoglm-compress serve]
set -eu
model=${1:?give a checkpoint, or RUN/STAGE}
shift
exec autoglm-compress serve "$model" --engine vllm --tensor-parallel 2 --served-model-name autoglm-phone-9b "$@"
