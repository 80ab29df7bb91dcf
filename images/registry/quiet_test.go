package registry

import (
	"io"
	stdlog "log"
	"os"
	"testing"

	"github.com/containerd/log"
)

// quiet is the log of servers whose clients fail on purpose.
var quiet = stdlog.New(io.Discard, "", 0)

func TestMain(m *testing.M) {
	_ = log.SetLevel("fatal")
	os.Exit(m.Run())
}
