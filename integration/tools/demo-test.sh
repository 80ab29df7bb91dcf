#!/usr/bin/env bash
# Tests `make demo`, on a machine where all that it needs is built: it builds nothing
# again, and its report says yes to all that it is asked.
#
# usage: demo-test.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CRAC_BUILD=${CRAC_BUILD:-$root/build}
CRAC_PROG=demo-test
# shellcheck source=integration/tools/lib.sh
. "$root/integration/tools/lib.sh"
cd "$root"

# built: what `make demo` would build where it is missing.
built() {
  stat -L -c '%n %i %Y' "$CRAC_BUILD"/tools/bin/* "$CRAC_BUILD"/images/{busybox,tomcat,postgres}.tar
}

before=$(built)
report=$CRAC_BUILD/demo.json
rm -f "$report"
make demo
[ "$before" = "$(built)" ] || die "make demo has built again what was there:"$'\n'"$(diff <(echo "$before") <(built))"
python3 - "$report" <<'PYTHON' || die "$report is not what it should be"
import json, sys
report = json.load(open(sys.argv[1]))
bad = [k for k in ("state_ok", "file_ok", "clones_ok", "cold_under_runc_ok", "dump_hidden_ok", "pool_ok_with_hook", "pool_fails_without_hook")
       if report.get(k) is not True]
bad += [k for k in ("cold_ms", "warm_ms", "ratio", "image_bytes", "checkpoint_layer_bytes") if not report.get(k, 0) > 0]
if not report.get("steps") or not all(s["name"] and s["ms"] >= 0 for s in report["steps"]):
    bad.append("steps")
if bad or report.get("problems"):
    sys.exit(f"demo.json: not as it should be: {', '.join(bad)} {report.get('problems')}")
PYTHON
