#!/bin/sh
# Fill in the fields marked with () in toolace.yaml, set LLAMA_FACTORY_PATH, and run this.
exec "$(dirname "$0")/../train.sh" "$(dirname "$0")/toolace.yaml" "$@"
