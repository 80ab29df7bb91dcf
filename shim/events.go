package shim

import (
	"context"

	"github.com/containerd/containerd/v2/core/events"
	cruntime "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// Our own events are of type google.rpc.Status, one of the few general ones that
// ctr and nerdctl can show: the message is for people, and the one detail, a
// google.protobuf.Struct, has the facts for programs.

// ColdStartTopic is the topic of the event that tells why a container that has
// a checkpoint was started cold. The facts are the strings container_id, reason
// and, if known, code.
const ColdStartTopic = "/crac/cold-start"

// CheckpointImageTopic is the topic of the event that tells of a checkpoint
// image that was built. The facts are container_id, image, digest, size (bytes),
// frozen_ms, dumped and pre_dumped (bytes of memory, copied during the freeze and
// ahead of it) and, if it was to be pushed, pushed.
const CheckpointImageTopic = "/crac/checkpoint-image"

// MemoryFailedTopic is the topic of the event that tells why a restored workload
// was killed whose memory could not be brought. The facts are container_id and
// reason.
const MemoryFailedTopic = "/crac/memory-failed"

// eventQueue is how many events may wait before senders do.
const eventQueue = 128

type queuedEvent struct {
	topic string
	event any
}

// eventSender publishes events one after another, in the order they were sent.
type eventSender struct {
	queue     chan queuedEvent
	publisher events.Publisher
	done      <-chan struct{}
}

func newEventSender(publisher events.Publisher, done <-chan struct{}) *eventSender {
	return &eventSender{queue: make(chan queuedEvent, eventQueue), publisher: publisher, done: done}
}

// send queues one of containerd's own events.
func (s *eventSender) send(event any) {
	s.sendTo(cruntime.GetTopic(event), event)
}

// sendFacts queues an event of our own.
func (s *eventSender) sendFacts(topic, message string, facts map[string]any) {
	detail, err := structpb.NewStruct(facts)
	if err == nil {
		event := &status.Status{Message: message, Details: make([]*anypb.Any, 1)}
		if event.Details[0], err = anypb.New(detail); err == nil {
			s.sendTo(topic, event)
			return
		}
	}
	log.L.WithError(err).WithField("topic", topic).Error("failed to make event")
}

func (s *eventSender) sendTo(topic string, event any) {
	select {
	case s.queue <- queuedEvent{topic, event}:
	case <-s.done:
	}
}

// run publishes until done is closed, and then what is still in the queue.
func (s *eventSender) run(ctx context.Context) {
	for {
		select {
		case e := <-s.queue:
			s.publish(ctx, e)
		case <-s.done:
			for {
				select {
				case e := <-s.queue:
					s.publish(ctx, e)
				default:
					return
				}
			}
		}
	}
}

// publish hands an event to containerd's publisher, which bounds each attempt itself and, while
// containerd is away, tries again later with the same context: one that ends here would have it send
// the event, not wait for the answer, and send it again (pkg/shim/publisher.go).
func (s *eventSender) publish(ctx context.Context, e queuedEvent) {
	ctx = context.WithoutCancel(ctx)
	if err := s.publisher.Publish(ctx, e.topic, e.event); err != nil {
		log.G(ctx).WithError(err).WithField("topic", e.topic).Error("failed to publish event")
	}
}
