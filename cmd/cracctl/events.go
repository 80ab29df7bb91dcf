package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	ctrevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"
	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
)

// event is what events tells.
type event struct {
	Time      time.Time `json:"time"`
	Namespace string    `json:"namespace"`
	Topic     string    `json:"topic"`
	Message   string    `json:"message"`
	// Facts are those of the shim's own events: see docs/events.md.
	Facts map[string]any `json:"facts,omitempty"`
}

func newEvents(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show checkpoints, restores and their failures as they happen",
		Long: `Show checkpoints, cold starts in place of restores, and what else the runtime tells,
as it happens, in the namespace (--all-namespaces: in all). docs/events.md has the
topics and what they carry. ctr events shows these among all of containerd's.`,
		Example: `  cracctl events
  cracctl events --all-namespaces --format json | jq -r .message`,
		Args: cobra.NoArgs,
	}
	all := cmd.Flags().BoolP("all-namespaces", "A", false, "of all namespaces")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, _ []string) error {
		filters := []string{`topic~="^/crac/"`, `topic=="/tasks/checkpointed"`}
		if !*all {
			for i := range filters {
				filters[i] = "namespace==" + quote(t.namespace) + "," + filters[i]
			}
		}
		envelopes, errs := s.EventService().Subscribe(s.ctx, filters...)
		for {
			select {
			case e := <-envelopes:
				if err := showEvent(cmd.OutOrStdout(), format, eventOf(e)); err != nil {
					return err
				}
			case err := <-errs:
				if s.ctx.Err() != nil {
					return nil // interrupted, as meant
				}
				return fmt.Errorf("containerd ended the events: %w", err)
			}
		}
	})
	return cmd
}

// eventOf understands the shim's events; of others it tells the topic.
func eventOf(e *ctrevents.Envelope) event {
	out := event{Time: e.Timestamp, Namespace: e.Namespace, Topic: e.Topic}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		out.Message = err.Error()
		return out
	}
	switch v := v.(type) {
	case *status.Status:
		out.Message = v.GetMessage()
		for _, d := range v.GetDetails() {
			var facts structpb.Struct
			if d.UnmarshalTo(&facts) == nil {
				out.Facts = facts.AsMap()
			}
		}
	case *eventstypes.TaskCheckpointed:
		out.Message = fmt.Sprintf("container %s was checkpointed: %s", v.ContainerID, v.Checkpoint)
	}
	return out
}

func showEvent(out io.Writer, format string, e event) error {
	switch format {
	case formatTable:
		_, err := fmt.Fprintf(out, "%s %s %s %s\n", e.Time.Local().Format(time.RFC3339), e.Namespace, strings.TrimPrefix(e.Topic, "/"), plain.Line(e.Message))
		return err
	case formatJSON:
		return json.NewEncoder(out).Encode(e) // one line, for programs that read on
	}
	return showTemplate(out, format, e)
}
