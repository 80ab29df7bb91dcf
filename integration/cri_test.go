package integration

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crac-shim/crac/integration/harness"
)

// criNamespace is where containerd's CRI keeps everything.
const criNamespace = "k8s.io"

// node is a containerd as a kubelet has it.
type node struct {
	*harness.T
	runtimeapi.RuntimeServiceClient
}

// newNode starts one, with the images of these applications.
func newNode(tb testing.TB, apps ...string) *node {
	tb.Helper()
	const pause = "crac.test/pause:latest"
	d, err := harness.StartContainerd(context.Background(), harness.Options{CRI: pause, Need: []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc}, Debug: os.Getenv("CRAC_DEBUG") != ""})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("containerd's log:\n%s", tailOf(d.Log(), 4000))
		}
		if err := d.Stop(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	t := d.For(tb, harness.TestLimit)
	if _, err := t.Network(); err != nil {
		t.Fatal(err)
	}
	t.Ctx = namespaces.WithNamespace(t.Ctx, criNamespace)
	for _, app := range append([]string{"busybox"}, apps...) {
		archive, err := t.Tools.Image(app)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(archive)
		if err != nil {
			t.Fatal(err)
		}
		_, err = t.Client.Import(t.Ctx, f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	pauseImage(t, pause)
	conn, err := grpc.NewClient("unix://"+t.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	n := &node{t, runtimeapi.NewRuntimeServiceClient(conn)}
	t.Eventually("the node's network", func() bool {
		st, err := n.Status(t.Ctx, &runtimeapi.StatusRequest{})
		return err == nil && slices.ContainsFunc(st.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool {
			return c.GetType() == runtimeapi.NetworkReady && c.GetStatus()
		})
	})
	return n
}

// pauseImage makes an image whose program does nothing, of busybox.
func pauseImage(t *harness.T, name string) {
	t.Helper()
	configured(t, "busybox", name, func(c *ocispec.ImageConfig) {
		*c = ocispec.ImageConfig{Entrypoint: []string{"sleep", "1000000"}, Env: c.Env}
	})
}

// configured makes an image of one of ours with another configuration.
func configured(t *harness.T, of, name string, change func(*ocispec.ImageConfig)) {
	t.Helper()
	store := t.Client.ContentStore()
	base, err := t.Client.ImageService().Get(t.Ctx, harness.ImageRef(of))
	if err != nil {
		t.Fatal(err)
	}
	m, err := images.Manifest(t.Ctx, store, base.Target, platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	data, err := content.ReadBlob(t.Ctx, store, m.Config)
	if err != nil {
		t.Fatal(err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	change(&config.Config)
	write := func(mediaType string, v any, labels map[string]string) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if err := content.WriteBlob(t.Ctx, store, desc.Digest.String(), strings.NewReader(string(data)), desc, content.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	ctx, done, err := t.Client.WithLease(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = done(context.Background()) }()
	outer := t.Ctx
	t.Ctx = ctx
	defer func() { t.Ctx = outer }()
	labels := map[string]string{}
	for i, l := range m.Layers {
		labels["containerd.io/gc.ref.content.l."+string(rune('0'+i))] = l.Digest.String()
	}
	m.MediaType, m.Versioned = ocispec.MediaTypeImageManifest, specs.Versioned{SchemaVersion: 2}
	m.Config = write(ocispec.MediaTypeImageConfig, config, nil)
	labels["containerd.io/gc.ref.content.config"] = m.Config.Digest.String()
	if _, err := t.Client.ImageService().Create(ctx, images.Image{Name: name, Target: write(ocispec.MediaTypeImageManifest, m, labels)}); err != nil {
		t.Fatal(err)
	}
}

// pod is a sandbox, and what a kubelet says of it with each container.
type pod struct {
	*node
	id, ip string
	config *runtimeapi.PodSandboxConfig
}

// run starts a pod of the RuntimeClass crac.
func (n *node) run(annotations map[string]string) *pod {
	n.Helper()
	p, err := n.tryRun(annotations)
	if err != nil {
		n.Fatal(err)
	}
	st, err := n.PodSandboxStatus(n.Ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		n.Fatal(err)
	}
	if p.ip = st.GetStatus().GetNetwork().GetIp(); p.ip == "" {
		n.Error("the pod has no address")
	}
	return p
}

func (n *node) tryRun(annotations map[string]string) (*pod, error) {
	n.Helper()
	name := newID(n.TB)
	logs, err := n.Path(name)
	if err != nil {
		n.Fatal(err)
	}
	p := &pod{node: n, config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default"}, Hostname: name,
		LogDirectory: logs, Annotations: annotations, DnsConfig: &runtimeapi.DNSConfig{},
		// Below the daemon's, where its clean-up looks.
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: "/" + n.Namespace, SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}}
	r, err := n.RunPodSandbox(n.Ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config, RuntimeHandler: "crac"})
	p.id = r.GetPodSandboxId()
	return p, err
}

// remove stops a pod and removes it with its containers, as a kubelet does.
func (p *pod) remove() {
	p.Helper()
	if _, err := p.StopPodSandbox(p.Ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.Error(err)
	}
	if _, err := p.RemovePodSandbox(p.Ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.Error(err)
	}
}

// start starts a container of the pod; attempt counts its restarts.
func (p *pod) start(image string, attempt uint32) (id string, err error) {
	p.Helper()
	r, err := p.CreateContainer(p.Ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: attempt}, Image: &runtimeapi.ImageSpec{Image: image},
		LogPath: "app.log", Envs: []*runtimeapi.KeyValue{{Key: "GODEBUG", Value: []byte("multipathtcp=0")}},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 256 << 20, CpuShares: 512},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}})
	if err != nil {
		return "", err
	}
	_, err = p.StartContainer(p.Ctx, &runtimeapi.StartContainerRequest{ContainerId: r.GetContainerId()})
	return r.GetContainerId(), err
}

func (p *pod) mustStart(image string, attempt uint32) (id string) {
	p.Helper()
	id, err := p.start(image, attempt)
	if err != nil {
		p.Fatal(err)
	}
	return id
}

// exec runs a command in a container, as exec probes do.
func (p *pod) exec(id string, args ...string) string {
	p.Helper()
	r, err := p.ExecSync(p.Ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: args, Timeout: 20})
	if err != nil || r.GetExitCode() != 0 {
		p.Fatalf("%v: %v, exit code %d: %s", args, err, r.GetExitCode(), r.GetStderr())
	}
	return string(r.GetStdout())
}

// counts asks the Go server to count, and expects a number.
func (p *pod) counts(id string, want int) {
	p.Helper()
	var body string
	p.Eventually("an answer of the server", func() bool {
		r, err := p.ExecSync(p.Ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"wget", "-q", "-O", "-", "http://127.0.0.1:8080/count"}, Timeout: 20})
		body = string(r.GetStdout())
		return err == nil && r.GetExitCode() == 0
	})
	if got := countIn(p.T, body); got != want {
		p.Errorf("the server counts %d, want %d", got, want)
	}
}

// A pod of the RuntimeClass, in the way of a kubelet: checkpointed on the node, started warm in
// another pod, restarted warm there, and probed, measured and stopped like any other.
func TestPods(tb *testing.T) {
	onlyCrac(tb)
	n := newNode(tb, "goserver")
	const warm, asked = "crac.test/shop:warm", "crac.test/shop:asked"
	first := n.run(map[string]string{"io.containerd.crac.checkpoint.image": asked})
	id := first.mustStart(harness.ImageRef("goserver"), 0)
	first.counts(id, 1)
	first.counts(id, 2)
	if got := strings.TrimSpace(first.exec(id, "hostname")); got != first.config.GetHostname() {
		n.Errorf("the host name is %s, want %s", got, first.config.GetHostname())
	}
	n.CracctlOK("--namespace", criNamespace, "checkpoint", id, warm)
	first.counts(id, 3)
	stats, err := n.ContainerStats(n.Ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil || stats.GetStats().GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		n.Errorf("statistics %v: %v", stats, err)
	}

	// The kubelet's own checkpoint makes its archive, and the image that the pod asks for.
	archive := filepath.Join(n.TempDir(), "archive.tar")
	if _, err := n.CheckpointContainer(n.Ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: archive}); err != nil {
		n.Error(err)
	}
	if st, err := os.Stat(archive); err != nil || st.Size() == 0 {
		n.Errorf("the archive: %v", err)
	}
	mustHaveImage(n.T, asked, true)
	first.counts(id, 4)
	const imported = "crac.test/shop:imported"
	n.CracctlOK("--namespace", criNamespace, "import", archive, imported)

	second := n.run(map[string]string{"io.containerd.crac.restore": "require", "unrelated.example/x": "y"})
	for attempt := range uint32(2) {
		id := second.mustStart(warm, attempt)
		second.counts(id, 3)
		if got := strings.TrimSpace(second.exec(id, "hostname")); got != second.config.GetHostname() {
			n.Errorf("the clone's host name is %s, want %s", got, second.config.GetHostname())
		}
		if second.ip == first.ip {
			n.Errorf("both pods have the address %s", first.ip)
		}
		stats, err := n.ContainerStats(n.Ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
		if err != nil || stats.GetStats().GetMemory().GetWorkingSetBytes().GetValue() == 0 {
			n.Errorf("the clone's statistics %v: %v", stats, err)
		}
		if _, err := n.StopContainer(n.Ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			n.Error(err)
		}
		st, err := n.ContainerStatus(n.Ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetStatus().GetExitCode() != 137 {
			n.Errorf("the stopped clone is %v: %v", st.GetStatus(), err)
		}
	}
	// Both of the kubelet's: the image, and what its archive became.
	for attempt, image := range map[uint32]string{2: asked, 3: imported} {
		id := second.mustStart(image, attempt)
		second.counts(id, 4)
		if _, err := n.StopContainer(n.Ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			n.Error(err)
		}
	}
	for _, p := range []*pod{first, second} {
		p.remove()
	}

	// An option that is none is an error that says so.
	if _, err := n.tryRun(map[string]string{"io.containerd.crac.restore": "sometimes"}); err == nil || !strings.Contains(err.Error(), "possible: auto, require, never") {
		n.Errorf("a mistyped annotation gives %v", err)
	}
}
