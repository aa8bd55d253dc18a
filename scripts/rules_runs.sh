# Sourced by the scripts that compare methods: `run`, with `results`, `common` (flags of every run), `program`, and `workers` (2) set before.
run() {  # NAME SEED FLAGS...: one run, its tables and settings kept; a run that is there already stays
  local out=$results/$1/seed-$2 work=data/rules-$1-$2
  [[ -e $out/done.json ]] && return
  rm -rf "$work"
  /usr/bin/env python "${program[@]}" "${common[@]}" --engine processes --workers "${workers:-2}" --threads 1 --seed "$2" --out "$work" "${@:3}"
  mkdir -p "$out"
  cp "$work"/{front.csv,layers.csv,log.csv,config.json,done.json} "$out"
  rm -rf "$work"
}
