# shellcheck shell=bash
# What install.sh, the application builder and the VM runner share: progress
# lines, logged commands, Debian packages and the machine's own Debian mirror.
# Source it after setting CRAC_BUILD (the absolute path of build/).

: "${CRAC_BUILD:?lib.sh: set CRAC_BUILD to the absolute path of the build directory first}"
: "${CRAC_PROG:=build}"
CRAC_LOGS="$CRAC_BUILD/logs"

# say TEXT...: one progress line with the seconds since this program started.
say() {
  printf '[%s %4ds] %s\n' "$CRAC_PROG" "$SECONDS" "$*" >&2
}

# die TEXT...: the thing, the reason, and the way out, on one line.
die() {
  printf '%s: error: %s\n' "$CRAC_PROG" "$*" >&2
  exit 1
}

# have_version WANT GOT: GOT is at least WANT, as versions compare.
have_version() {
  [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$1" ]
}

# logged NAME TEXT COMMAND...: runs COMMAND with its output in build/logs/NAME.log,
# says TEXT at the start and that it is still going every 30 s; when it fails, shows
# the end of the log and ends the program. Call it as a plain statement, never after
# || or in an if: bash would then ignore set -e inside COMMAND, and a function whose
# third line failed would carry on with its fourth.
logged() {
  local log="$CRAC_LOGS/$1.log"
  try_logged "$@"
  [ "$CRAC_STATUS" -eq 0 ] || die "$2: failed with status $CRAC_STATUS: see $log"
}

# try_logged NAME TEXT COMMAND...: the same, but leaves the status in CRAC_STATUS.
try_logged() {
  local name="$1" text="$2" log pid next began=$SECONDS
  shift 2
  mkdir -p "$CRAC_LOGS"
  log="$CRAC_LOGS/$name.log"
  say "$text"
  # fd 9 is the caller's lock: a daemonised child must not keep it.
  ("$@") >"$log" 2>&1 </dev/null 9>&- &
  pid=$!
  CRAC_CHILD=$pid
  next=$((SECONDS + 30))
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if [ "$SECONDS" -ge "$next" ]; then
      say "$text: still at it after $((SECONDS - began)) s (log: $log)"
      next=$((SECONDS + 30))
    fi
  done
  CRAC_STATUS=0
  wait "$pid" || CRAC_STATUS=$?
  CRAC_CHILD=
  if [ "$CRAC_STATUS" -ne 0 ]; then
    say "$text: status $CRAC_STATUS; the end of $log:"
    tail -n 20 "$log" | sed 's/^/    /' >&2
  fi
}

# stop_child: ends the command that logged is running, with its children.
stop_child() {
  [ -n "${CRAC_CHILD:-}" ] || return 0
  local kids
  kids=$(descendants "$CRAC_CHILD")
  # shellcheck disable=SC2086 # a list of process ids
  kill -TERM $kids "$CRAC_CHILD" 2>/dev/null || true
  wait "$CRAC_CHILD" 2>/dev/null || true
  CRAC_CHILD=
}

# descendants PID: the ids of all processes below PID.
descendants() {
  local kid
  # shellcheck disable=SC2013 # the files hold words
  for kid in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
    descendants "$kid"
    printf '%s ' "$kid"
  done
}

# debian_packages PACKAGE...: makes sure that Debian packages are installed.
# Touches nothing when they are; asks for fresh lists only when they are needed.
debian_packages() {
  local p missing=()
  for p in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || die "packages missing: ${missing[*]}; not root, so install them with: sudo apt-get install ${missing[*]}"
  local how=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=600)
  # A known candidate may still be gone from the mirror: so fresh lists are the
  # second try, not the first.
  if apt-cache show "${missing[@]}" >/dev/null 2>&1; then
    try_logged apt-install "Debian packages: ${missing[*]}" \
      "${how[@]}" install --no-install-recommends "${missing[@]}"
    [ "$CRAC_STATUS" -ne 0 ] || return 0
  fi
  logged apt-update "Debian package lists" "${how[@]}" update
  logged apt-install "Debian packages: ${missing[*]}" \
    "${how[@]}" install --no-install-recommends "${missing[@]}"
}

# debian_mirror: prints the URI of the Debian mirror that this machine's apt
# uses, from deb822 .sources or one-line .list files; never a security archive.
debian_mirror() {
  local dir=${CRAC_APT_ETC:-/etc/apt} f uri=
  for f in "$dir"/sources.list.d/*.sources; do
    [ -f "$f" ] || continue
    uri=$(awk '
      function flush() {
        if (types ~ /(^| )deb( |$)/ && comps ~ /(^| )main( |$)/ && enabled != "no" &&
            suites !~ /security/ && uris != "" && !done) { split(uris, u, " "); print u[1]; done = 1 }
        types = uris = suites = comps = enabled = ""
      }
      /^#/ { next }
      /^[ \t]*$/ { flush(); next }
      {
        key = tolower($0); sub(/:.*/, "", key)
        val = $0; sub(/^[^:]*:[ \t]*/, "", val)
        if (key == "types") types = val
        if (key == "uris") uris = val
        if (key == "suites") suites = val
        if (key == "components") comps = val
        if (key == "enabled") enabled = tolower(val)
      }
      END { flush() }' "$f")
    [ -z "$uri" ] || break
  done
  if [ -z "$uri" ]; then
    for f in "$dir"/sources.list "$dir"/sources.list.d/*.list; do
      [ -f "$f" ] || continue
      uri=$(awk '
        $1 == "deb" {
          sub(/^deb[ \t]+/, ""); sub(/^\[[^]]*\][ \t]*/, "")
          if ($2 !~ /security/ && (" " $0 " ") ~ / main /) { print $1; exit }
        }' "$f")
      [ -z "$uri" ] || break
    done
  fi
  [ -n "$uri" ] || die "no Debian mirror found in $dir/sources.list or $dir/sources.list.d; add one with component main"
  printf '%s\n' "${uri%/}"
}

# private_apt DIR SUITE: sets APT_PRIVATE to the options that make apt-get and
# apt-cache work on SUITE of the machine's mirror with all state in DIR, as if
# no package were installed, and fetches the lists. The machine's own apt state
# is not touched. A mirror that has not been renewed for so long that its lists
# have expired is used all the same, with a word about it. Signatures are checked with the machine's Debian keyring; when
# that is too old to know SUITE, the newer keyring package is taken from the
# machine's own suite, where the old keyring vouches for it.
private_apt() {
  local dir=$1 suite=$2 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  mirror=$(debian_mirror)
  mkdir -p "$dir"/lists/partial "$dir"/cache/archives/partial "$dir"/empty.d
  : >"$dir/status"
  APT_PRIVATE=(
    -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
    -o "Dir::State::extended_states=$dir/extended_states"
    -o "Dir::Cache=$dir/cache" -o "Dir::Cache::archives=$dir/cache/archives"
    -o "Dir::Etc::sourcelist=$dir/sources.list" -o "Dir::Etc::sourceparts=$dir/empty.d"
    -o "Dir::Etc::preferences=$dir/empty" -o "Dir::Etc::preferencesparts=$dir/empty.d"
    -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Acquire::Languages=none
    -o Acquire::Retries=3 -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
  )
  [ -f "$keyring" ] || die "$keyring is missing: apt-get install debian-archive-keyring"
  printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$dir/sources.list"
  # Callers may run this in an if, where set -e is off: so every step is asked.
  apt-get "${APT_PRIVATE[@]}" --error-on=any update 2>&1 | tee "$dir/update.log"
  [ "${PIPESTATUS[0]}" -ne 0 ] || return 0
  if grep -q 'Release file .* is expired' "$dir/update.log"; then
    echo "The mirror's lists of $suite have expired: their signature counts, their age does not."
    APT_PRIVATE+=(-o Acquire::Check-Valid-Until=false)
    apt-get "${APT_PRIVATE[@]}" --error-on=any update && return 0
  fi
  (cd "$dir" && apt-get -o APT::Sandbox::User=root download debian-archive-keyring) || return 1
  dpkg -x "$dir"/debian-archive-keyring_*.deb "$dir/keyring" || return 1
  keyring="$dir/keyring$keyring"
  # Newer keyring packages ship ASCII-armoured .pgp files beside or instead.
  [ -f "$keyring" ] || keyring="${keyring%.gpg}.pgp"
  [ -f "$keyring" ] || return 1
  printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$dir/sources.list"
  apt-get "${APT_PRIVATE[@]}" --error-on=any update
}
