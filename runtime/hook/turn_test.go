package hook

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTurn(t *testing.T) {
	noLeaks(t)
	bundle := t.TempDir()
	end, err := Turn(t.Context(), bundle)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Turn(ctx, bundle); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another has it: %v", err)
	}
	next := make(chan error, 1)
	go func() {
		end, err := Turn(t.Context(), bundle)
		if err == nil {
			end()
		}
		next <- err
	}()
	end()
	if err := <-next; err != nil {
		t.Errorf("after another had it: %v", err)
	}
	if _, err := Turn(t.Context(), filepath.Join(bundle, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no bundle: %v", err)
	}
}
