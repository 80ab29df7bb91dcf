package load

import "testing"

func TestParse(t *testing.T) {
	for line, want := range map[string]int{
		"0.20 0.18 0.12 1/80 11206\n":   1,
		"10.2 0.18 0.12 117/8000 112\n": 117,
		"":                              0,
		"0.1 0.2":                       0,
	} {
		if got := parse([]byte(line)); got != want {
			t.Errorf("%q: %d instead of %d", line, got, want)
		}
	}
}

// At least the thread that asks runs.
func TestRunnable(t *testing.T) {
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := Runnable(f); got < 1 {
		t.Errorf("%d threads want to run", got)
	}
	if got := Runnable(nil); got != 0 {
		t.Errorf("%d threads want to run where nobody knows", got)
	}
}
