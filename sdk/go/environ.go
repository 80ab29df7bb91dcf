package crac

import (
	"os"
	"strings"
)

// environ is the environment that the container was started with. Its first process
// knows; between that and this one a script may have changed more, which a restore must
// leave alone.
func environ() map[string]string {
	for _, pid := range []string{"1", "self"} {
		if text, err := os.ReadFile("/proc/" + pid + "/environ"); err == nil {
			env := parseEnviron(strings.Split(string(text), "\x00"))
			if env["CRAC_DIR"] != "" {
				return env
			}
		}
	}
	return parseEnviron(os.Environ())
}

func parseEnviron(pairs []string) map[string]string {
	env := make(map[string]string, len(pairs))
	for _, p := range pairs {
		if k, v, ok := strings.Cut(p, "="); ok && k != "" {
			env[k] = v
		}
	}
	return env
}

// updateEnviron puts into the process's environment what differs between two requests.
// What the program itself changed stays, unless the request changed the same variable; a
// variable goes that the request no longer has. CRAC_DIR is where the sockets are, in a
// clone too.
func updateEnviron(before, now map[string]string) error {
	for k, v := range now {
		if old, ok := before[k]; ok && old == v || k == "CRAC_DIR" {
			continue
		}
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	for k, old := range before {
		if _, ok := now[k]; ok || k == "CRAC_DIR" {
			continue
		}
		if v, ok := os.LookupEnv(k); ok && v == old {
			if err := os.Unsetenv(k); err != nil {
				return err
			}
		}
	}
	return nil
}
