package oci

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseCheckpointOptions(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       CheckpointOptions
		wantErr    string
	}{
		{name: "nothing", text: "{}"},
		{
			name: "everything", text: `{"ref":"r/a:1","exit":true,"compression":"gzip","parent":"r/a:0","tcp":"established"}`,
			want: CheckpointOptions{Ref: "r/a:1", Exit: true, Compression: CompressionGzip, Parent: "r/a:0", TCP: TCPEstablished},
		},
		{name: "of a newer cracctl", text: `{"sideways":true}`, wantErr: `unknown field "sideways"; the shim and cracctl must come from one release`},
		{name: "no JSON", text: "x", wantErr: "checkpoint options"},
		{name: "compression", text: `{"compression":"xz"}`, wantErr: `unknown compression "xz"; known are zstd, gzip`},
		{name: "pre-dump", text: `{"preDump":"off"}`, want: CheckpointOptions{PreDump: PreDumpOff}},
		{name: "bad pre-dump", text: `{"preDump":"always"}`, wantErr: "auto, require, off"},
		{name: "recipients", text: `{"encryptTo":["jwe:/k"],"keys":["/p"]}`, want: CheckpointOptions{EncryptTo: []string{"jwe:/k"}, Keys: []string{"/p"}}},
		{name: "no recipient", text: `{"encryptTo":["k"]}`, wantErr: `recipient "k" is none`},
		{name: "connections", text: `{"tcp":"shut"}`, wantErr: `unknown tcp "shut"; known are close, established, error`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseCheckpointOptions([]byte(tt.text))
			switch {
			case tt.wantErr == "" && err != nil, tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)):
				t.Fatalf("error %v, want %q", err, tt.wantErr)
			case tt.wantErr == "" && !reflect.DeepEqual(got, tt.want):
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}
