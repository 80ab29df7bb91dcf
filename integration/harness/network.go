package harness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
)

const bridgePrefix = "crac"

// Network is the daemon's private bridge network: the only one in its CNI configuration, so it
// is the one that `ctr run --cni` uses, and nerdctl's default network.
type Network struct {
	Name, Bridge string
	Subnet       string // CIDR
	Gateway      string // the host's address in it

	d    *Daemon
	cni  *libcni.CNIConfig
	conf *libcni.NetworkConfigList
}

// Network makes the private network, once. The bridge itself appears with the first container.
func (d *Daemon) Network() (*Network, error) {
	if d.network != nil {
		return d.network, nil
	}
	if _, err := d.Tools.path(CNI); err != nil {
		return nil, err
	}
	id := make([]byte, 4)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	n := &Network{d: d, Name: "bridge", Bridge: bridgePrefix + hex.EncodeToString(id[:3])}
	var err error
	if n.Subnet, n.Gateway, err = freeSubnet(); err != nil {
		return nil, err
	}
	// The bridge plugin turns forwarding on and leaves it on.
	if err := d.KeepHostFile("/proc/sys/net/ipv4/ip_forward"); err != nil {
		return nil, err
	}
	// The names and labels are what nerdctl expects of its default network. No masquerading: the
	// tests talk to containers from the host, and need no packet filter for it. loopback is in the
	// chain because ctr, other than nerdctl and CRI, does not add it by itself.
	conf, err := json.MarshalIndent(map[string]any{
		"cniVersion":    "1.0.0",
		"name":          n.Name,
		"nerdctlID":     "17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f8b6121",
		"nerdctlLabels": map[string]string{"nerdctl/default-network": "true"},
		"plugins": []map[string]any{
			{
				"type": "bridge", "bridge": n.Bridge, "isGateway": true, "ipMasq": false, "hairpinMode": true,
				"ipam": map[string]any{
					"type": "host-local", "dataDir": d.path("cni/ipam"),
					"ranges": [][]map[string]string{{{"subnet": n.Subnet, "gateway": n.Gateway}}},
					"routes": []map[string]string{{"dst": "0.0.0.0/0"}},
				},
			},
			{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
			{"type": "loopback"},
		},
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	file := d.path("cni/net.d/nerdctl-bridge.conflist")
	if err := os.WriteFile(file, conf, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(d.path("bridge"), []byte(n.Bridge), 0o600); err != nil { // for the janitor
		return nil, err
	}
	if n.conf, err = libcni.ConfListFromFile(file); err != nil {
		return nil, err
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{d.Tools.CNI}, d.path("cni/lib"), nil)
	d.network = n
	return n, nil
}

// freeSubnet picks a /24 that none of the host's interfaces is in.
func freeSubnet() (subnet, gateway string, err error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", "", err
	}
	for range 100 {
		b := make([]byte, 2)
		if _, err := rand.Read(b); err != nil {
			return "", "", err
		}
		gw := net.IPv4(10, b[0], b[1], 1)
		own := &net.IPNet{IP: gw.Mask(net.CIDRMask(24, 32)), Mask: net.CIDRMask(24, 32)}
		taken := false
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && (n.Contains(gw) || own.Contains(n.IP)) {
				taken = true
			}
		}
		if !taken {
			return own.String(), gw.String(), nil
		}
	}
	return "", "", errors.New("no free 10.x.y.0/24 network was found on this host")
}

// NetNS makes a network namespace and returns its path. Its name on the host has the daemon's
// namespace in it.
func (d *Daemon) NetNS(ctx context.Context, name string) (string, error) {
	full := d.Namespace + "-" + name
	if _, err := Run(ctx, d.Command(ctx, "ip", "netns", "add", full)); err != nil {
		return "", err
	}
	d.netns[name] = struct{}{}
	return filepath.Join("/run/netns", full), nil
}

// DeleteNetNS removes a network namespace that NetNS made.
func (d *Daemon) DeleteNetNS(ctx context.Context, name string) error {
	delete(d.netns, name)
	_, err := Run(ctx, d.Command(ctx, "ip", "netns", "delete", d.Namespace+"-"+name))
	return err
}

func runtimeConf(id, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: "eth0"}
}

// Attach connects a network namespace to the network and returns its address.
func (n *Network) Attach(ctx context.Context, id, netns string) (string, error) {
	res, err := n.cni.AddNetworkList(ctx, n.conf, runtimeConf(id, netns))
	if err != nil {
		return "", fmt.Errorf("attach %s to network %s: %w", netns, n.Bridge, err)
	}
	r, err := current.GetResult(res)
	if err != nil {
		return "", err
	}
	if len(r.IPs) == 0 {
		return "", fmt.Errorf("network %s gave %s no address", n.Bridge, netns)
	}
	return r.IPs[0].Address.IP.String(), nil
}

// Detach undoes Attach.
func (n *Network) Detach(ctx context.Context, id, netns string) error {
	if err := n.cni.DelNetworkList(ctx, n.conf, runtimeConf(id, netns)); err != nil {
		return fmt.Errorf("detach %s from network %s: %w", netns, n.Bridge, err)
	}
	return nil
}

// Release frees what `ctr run --cni` took for a container that runs no more: a detached ctr has
// nobody who does it.
func (n *Network) Release(ctx context.Context, id string) error {
	return n.Detach(ctx, n.d.Namespace+"-"+id, "")
}

// IP returns the address that a running process has in the network.
func (n *Network) IP(ctx context.Context, pid int) (string, error) {
	out, err := Run(ctx, n.d.Command(ctx, "nsenter", "-t", fmt.Sprint(pid), "-n", "ip", "-json", "-4", "addr", "show", "dev", "eth0"))
	if err != nil {
		return "", err
	}
	var links []struct {
		Addrs []struct {
			Local string `json:"local"`
		} `json:"addr_info"`
	}
	if err := json.Unmarshal([]byte(out), &links); err != nil {
		return "", err
	}
	for _, l := range links {
		for _, a := range l.Addrs {
			return a.Local, nil
		}
	}
	return "", fmt.Errorf("process %d has no address on eth0", pid)
}

func (n *Network) remove(ctx context.Context) error {
	if _, err := os.Stat("/sys/class/net/" + n.Bridge); err != nil {
		return nil
	}
	_, err := Run(ctx, n.d.Command(ctx, "ip", "link", "delete", n.Bridge))
	return err
}
