#!/bin/sh
# Fill in the fields marked with () in reranker.yaml, set LLAMA_FACTORY_PATH, and run this.
exec "$(dirname "$0")/../train.sh" "$(dirname "$0")/reranker.yaml" "$@"
