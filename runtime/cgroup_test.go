package runtime

import (
	"reflect"
	"testing"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

func TestApply(t *testing.T) {
	// What a container has before each update.
	had := func() cgroups.Resources {
		return cgroups.Resources{
			Memory: 100, MemoryReservation: 50, MemorySwap: 200,
			CpuShares: 512, CpuWeight: 20, CpuPeriod: 1000, CpuQuota: 500,
			CpuRtPeriod: 7, CpuRtRuntime: 6, CpuBurst: ptr(uint64(9)), CpusetCpus: "0-1", CpusetMems: "0",
			PidsLimit: ptr(int64(10)), BlkioWeight: 300, Unified: map[string]string{"memory.high": "1"},
			BlkioThrottleReadBpsDevice: []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(8, 0, 1), cgroups.NewThrottleDevice(8, 16, 2)},
		}
	}
	for name, tt := range map[string]struct {
		update specs.LinuxResources
		want   func(*cgroups.Resources)
	}{
		"nothing": {specs.LinuxResources{}, func(*cgroups.Resources) {}},
		"memory": {
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(111)), Reservation: ptr(int64(55)), Swap: ptr(int64(222)), CheckBeforeUpdate: ptr(true)}},
			func(r *cgroups.Resources) {
				r.Memory, r.MemoryReservation, r.MemorySwap, r.MemoryCheckBeforeUpdate = 111, 55, 222, true
			},
		},
		"memory limit alone leaves swap": {
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(111))}},
			func(r *cgroups.Resources) { r.Memory = 111 },
		},
		"no memory limit, so none of swap": {
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}},
			func(r *cgroups.Resources) { r.Memory, r.MemorySwap = -1, 0 },
		},
		"no memory limit, but swap is said": {
			specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))}},
			func(r *cgroups.Resources) { r.Memory, r.MemorySwap = -1, -1 },
		},
		"quota alone keeps the period": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(700)), Cpus: "0-1", Mems: "0", Burst: ptr(uint64(9))}},
			func(r *cgroups.Resources) { r.CpuQuota = 700 },
		},
		"period alone keeps the quota": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Period: ptr(uint64(2000)), Cpus: "0-1", Mems: "0", Burst: ptr(uint64(9))}},
			func(r *cgroups.Resources) { r.CpuPeriod = 2000 },
		},
		"neither removes both": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0-1", Mems: "0", Burst: ptr(uint64(9))}},
			func(r *cgroups.Resources) { r.CpuPeriod, r.CpuQuota = 0, 0 },
		},
		"shares, with the weight of cgroup v2": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024)), Period: ptr(uint64(1000)), Quota: ptr(int64(500)), Cpus: "1", RealtimePeriod: ptr(uint64(70)), RealtimeRuntime: ptr(int64(60))}},
			func(r *cgroups.Resources) {
				r.CpuShares, r.CpuWeight = 1024, cgroups.ConvertCPUSharesToCgroupV2Value(1024)
				r.CpusetCpus, r.CpusetMems, r.CpuBurst, r.CpuRtPeriod, r.CpuRtRuntime = "1", "", nil, 70, 60
			},
		},
		"idle refuses a weight": {
			specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(1)), Period: ptr(uint64(1000)), Quota: ptr(int64(500))}},
			func(r *cgroups.Resources) {
				r.CPUIdle, r.CpuShares, r.CpuWeight, r.CpusetCpus, r.CpusetMems, r.CpuBurst = ptr(int64(1)), 0, 0, "", "", nil
			},
		},
		"pids and unified": {
			specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(20))}, Unified: map[string]string{"memory.low": "2"}},
			func(r *cgroups.Resources) {
				r.PidsLimit, r.Unified = ptr(int64(20)), map[string]string{"memory.low": "2"}
			},
		},
		"block devices: one more, one changed, one kept": {
			specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{
				Weight: ptr(uint16(400)), LeafWeight: ptr(uint16(401)),
				WeightDevice: []specs.LinuxWeightDevice{{LinuxBlockIODevice: specs.LinuxBlockIODevice{Major: 8, Minor: 32}, Weight: ptr(uint16(500))}},
				ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{
					{LinuxBlockIODevice: specs.LinuxBlockIODevice{Major: 8, Minor: 0}, Rate: 11},
					{LinuxBlockIODevice: specs.LinuxBlockIODevice{Major: 9, Minor: 0}, Rate: 12},
				},
				ThrottleWriteBpsDevice:  []specs.LinuxThrottleDevice{{Rate: 13}},
				ThrottleReadIOPSDevice:  []specs.LinuxThrottleDevice{{Rate: 14}},
				ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{{Rate: 15}},
			}},
			func(r *cgroups.Resources) {
				r.BlkioWeight, r.BlkioLeafWeight = 400, 401
				r.BlkioWeightDevice = []*cgroups.WeightDevice{cgroups.NewWeightDevice(8, 32, 500, 0)}
				r.BlkioThrottleReadBpsDevice = []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(8, 16, 2), cgroups.NewThrottleDevice(8, 0, 11), cgroups.NewThrottleDevice(9, 0, 12)}
				r.BlkioThrottleWriteBpsDevice = []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(0, 0, 13)}
				r.BlkioThrottleReadIOPSDevice = []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(0, 0, 14)}
				r.BlkioThrottleWriteIOPSDevice = []*cgroups.ThrottleDevice{cgroups.NewThrottleDevice(0, 0, 15)}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := had()
			got, want := before, had()
			// These follow the request, whatever else it says.
			want.PidsLimit, want.Unified = nil, nil
			tt.want(&want)
			asked := tt.update
			if asked.CPU != nil {
				asked.CPU = ptr(*asked.CPU)
			}
			apply(&got, &tt.update)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			// libcontainer falls back on what it had when the new values fail.
			if untouched := had(); !reflect.DeepEqual(before, untouched) {
				t.Errorf("the update has changed what was there before it:\ngot  %+v\nwant %+v", before, untouched)
			}
			if !reflect.DeepEqual(tt.update, asked) {
				t.Errorf("the update has changed the request: %+v", tt.update)
			}
		})
	}
}
