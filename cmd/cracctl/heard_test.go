package main

import (
	"context"
	"errors"
	"os"
	"testing"
)

func TestWhileHeard(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		reader, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		ctx, stop, err := whileHeard(t.Context(), out)
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if _, err := out.WriteString("said and not yet read\n"); err != nil || ctx.Err() != nil {
			t.Errorf("%v, %v", err, ctx.Err())
		}
		if stopped {
			stop()
		}
		if err := reader.Close(); err != nil {
			t.Fatal(err)
		}
		if stopped {
			if ctx.Err() != nil {
				t.Errorf("after the watch: %v", ctx.Err())
			}
			continue
		}
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), errUnheard) {
			t.Errorf("it ended with %v", context.Cause(ctx))
		}
	}
}
