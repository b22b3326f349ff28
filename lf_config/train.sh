#!/bin/sh
# Usage: train.sh FILE.yaml [name=value …]; the scripts in the folders of the datasets call it.
# Values given as name=value come before those of the file. With adapter_name_or_path=FOLDER the LoKI adapter in that
# folder is trained, otherwise the LoKI model that `loki create-model` wrote.
# LLAMA_FACTORY_PATH: checkout of LlamaFactory. LAUNCHER: how adapters are trained on several GPUs, for instance
# "torchrun --nproc-per-node 4"; LoKI models need none, because llamafactory-cli finds the GPUs itself.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(cd "$(dirname "$1")" && pwd)
file=$folder/$(basename "$1")
shift
if [ -z "${LLAMA_FACTORY_PATH:-}" ]; then
  echo "LLAMA_FACTORY_PATH is not set: name the folder of LlamaFactory's checkout" >&2
  exit 2
fi
for field in $(sed -n 's/^\([a-z_]*\): *(.*$/\1/p' "$file"); do
  case " $* " in
    *" $field="*) ;;
    *)
      echo "$field in $file is not filled in: write a value in place of (), or give $field=…" >&2
      exit 2
      ;;
  esac
done
cd "$LLAMA_FACTORY_PATH"
# The folder of the dataset is dataset_dir, so that LlamaFactory's own dataset_info.json stays as it is.
case " $* " in
  *" adapter_name_or_path="*)
    exec ${LAUNCHER:-python} "$here/train_adapter.py" "$file" dataset_dir="$folder" finetuning_type=lora "$@"
    ;;
  *) exec llamafactory-cli train "$file" dataset_dir="$folder" "$@" ;;
esac
