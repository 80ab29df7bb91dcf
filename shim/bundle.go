package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
)

// What the shim writes into a bundle, besides libcontainer's state.
const (
	optionsFile = "options.json"
	exitFile    = "exit.json"
	stateDir    = "state"
)

// stateRoot is the directory in which libcontainer keeps the container's state:
// in the bundle, so that it goes when the bundle goes, unless option Root says
// otherwise.
func stateRoot(o *runcoptions.Options, namespace, bundle string) string {
	if o.GetRoot() != "" {
		return filepath.Join(o.GetRoot(), namespace)
	}
	return filepath.Join(bundle, stateDir)
}

// exitRecord lets `delete` tell how the init ended when the shim died later.
type exitRecord struct {
	Pid    int       `json:"pid"`
	Status int       `json:"status"`
	At     time.Time `json:"at"`
}

func writeOptions(bundle string, o *runcoptions.Options) error {
	return writeJSON(filepath.Join(bundle, optionsFile), o)
}

func readOptions(bundle string) (*runcoptions.Options, error) {
	var o runcoptions.Options
	err := readJSON(filepath.Join(bundle, optionsFile), &o)
	if errors.Is(err, fs.ErrNotExist) {
		return &o, nil // the shim died before it had any
	}
	return &o, err
}

func writeExit(bundle string, e exitRecord) error {
	return writeJSON(filepath.Join(bundle, exitFile), e)
}

func readExit(bundle string) (e exitRecord, err error) {
	return e, readJSON(filepath.Join(bundle, exitFile), &e)
}

// writeJSON writes a file that is whole or not there.
func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	// 0600, and its own: others may write the same file.
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	return nil
}

// workDir is the container's directory that is not lost with a reboot and need
// not fit into memory: containerd links it from the bundle.
func workDir(bundle string) string {
	if dir, err := filepath.EvalSymlinks(filepath.Join(bundle, "work")); err == nil {
		return dir
	}
	return bundle
}
