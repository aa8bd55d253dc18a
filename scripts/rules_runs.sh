# Sourced, in the project's root, by the scripts that compare methods. Set before `run`: `results`, `common` (flags of every run),
# `program`, and `workers`, 2 unless set; `timed`, if seconds.txt is to say how long a command took.

link() {  # TARGET NAME: data/NAME leads there, so that no path of this machine is recorded
  mkdir -p data
  [[ -e data/$2 ]] || ln -s "$1" "data/$2"
}

dense() {  # NAME EPOCHS FLAGS...: train data/NAME.safetensors, unless it is there, and start every run from it
  mkdir -p "$results" data
  if [[ ! -e data/$1.safetensors ]]; then
    python scripts/train_dense.py "data/$1.safetensors" "${common[@]}" --train-epochs "$2" --seed 0 "${@:3}" | tee >(cat >&2) |
      tail -1 > "$results/dense.txt"
  fi
  common+=(--weights "data/$1.safetensors")
}

run() {  # NAME SEED FLAGS...: one run, its tables and settings kept; one that is there stays, one that was stopped goes on
  local out=$results/$1/seed-$2 work=data/${results//\//-}-$1-$2 began=$SECONDS
  local engine=(--engine processes --workers "${workers:-2}") flags="${program[*]} ${common[*]} ${*:3}"
  [[ -e $out/done.json ]] && return
  if [[ -e $work/config.json && -z ${timed:-} && $(cat "$work.flags") == "$flags" ]]; then
    /usr/bin/env python "${program[@]}" "${engine[@]}" --resume "$work"
  else
    rm -rf "$work"
    mkdir -p data && echo "$flags" > "$work.flags"
    /usr/bin/env python "${program[@]}" "${common[@]}" "${engine[@]}" --threads 1 --seed "$2" --out "$work" "${@:3}"
  fi
  mkdir -p "$out"
  [[ -z ${timed:-} ]] || echo $((SECONDS - began)) > "$out/seconds.txt"
  cp "$work"/{front.csv,layers.csv,log.csv,config.json,done.json} "$out"
  rm -rf "$work" "$work.flags"
}
