#!/usr/bin/env bash
# The built artefacts as users get them: the wheel in an empty environment, away from the checkout, and a build where there
# is no compiler. Called by `make check-wheel`, which has put both artefacts into dist/.
set -euo pipefail
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

use() {  # use PREFIX BACKEND: fit through the API and the command line
    "$1/bin/python" - "$2" <<'PY'
import sys
import numpy as np
import emalgam, emalgam_kernels
assert "site-packages" in emalgam.__file__ and "site-packages" in emalgam_kernels.__file__, emalgam.__file__
rng = np.random.default_rng(0)
x = np.concatenate([rng.normal(-5, 1, (500, 2)), rng.normal(5, 1, (500, 2))])
np.save("x.npy", x)
result = emalgam.fit(x, 2, random_state=0)
assert result.backend == sys.argv[1], result.backend
assert sorted(result.mixture.means[:, 0].round()) == [-5.0, 5.0]
print(f"fit outside the checkout with {result.backend}: mean log-likelihood {result.lower_bound:.6f}")
PY
    "$1/bin/emalgam" fit x.npy -k 2 -o model.safetensors --quiet
    "$1/bin/emalgam" score x.npy model.safetensors --json
    "$1/bin/emalgam" info >/dev/null
}

echo "-- the wheel"
"$python" -m venv wheel
wheel/bin/python -m pip install --quiet "$root"/dist/emalgam-*.whl
use "$work/wheel" cython_cpu
for name in mixture.pxd mixture.pyi tiles.h; do
    test -n "$(find wheel -path "*cython_cpu/$name")" || { echo "$name is not in the wheel"; exit 1; }
done
test -n "$(find wheel -path "*emalgam/nn/training.py")" || { echo "emalgam.nn is not in the wheel"; exit 1; }
{ wheel/bin/python -c "import emalgam.nn" 2>&1 || true; } | grep -q "pip install emalgam\[torch\]" \
    || { echo "emalgam.nn does not say what to install without torch"; exit 1; }
test -n "$(find wheel -path "*numba_cuda/crossover.json")" || { echo "crossover.json is not in the wheel"; exit 1; }

echo "-- the source distribution on a machine without a compiler"
"$python" -m venv bare
CC=/nonexistent/cc bare/bin/python -m pip install --quiet --no-cache-dir "$root"/dist/emalgam-*.tar.gz
use "$work/bare" numba_cpu
"$work/bare/bin/emalgam" info --json >info.json
grep -q "no C compiler was found" info.json || { echo "info does not say why cython_cpu is missing:"; cat info.json; exit 1; }
