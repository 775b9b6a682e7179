package rpc

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/pool"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// Facts says what the machine is and how its parts are. A part that does not
// answer is a fact, and no error.
func (s *hostService) Facts(ctx context.Context, _ *emptypb.Empty) (*ingotv1.HostFacts, error) {
	f := &ingotv1.HostFacts{
		Version: s.Version, Uptime: durationpb.New(s.Host.Uptime()), Vcpus: int32(runtime.NumCPU()),
		DaemonRssBytes: wire.RSS(), ConfigFile: s.ConfigFile, StateDir: s.StateDir, GrpcEndpoint: s.Listen,
	}
	f.Hostname, _ = os.Hostname()
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		f.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	memory(f)
	owners := map[string]string{}
	for _, v := range s.Host.List("", "") {
		f.Microvms++
		if v.Status.Phase == vm.Running {
			f.MicrovmsRunning++
		}
		for _, l := range v.Status.Links {
			owners[l.Device] = v.Spec.UID
		}
	}
	now, most := s.Host.Promised()
	f.MicrovmsCommitted, f.VcpusCommitted, f.MemoryCommittedBytes = int32(now.MicroVMs), int32(now.VCPUs), now.Memory.Bytes()
	f.MicrovmsLimit, f.VcpusLimit, f.MemoryLimitBytes = int32(most.MicroVMs), int32(most.VCPUs), most.Memory.Bytes()
	for name, d := range s.Host.Drivers() {
		f.Drivers = append(f.Drivers, &ingotv1.DriverFacts{
			Name: name, Available: d.Available, Version: d.Version, Accelerator: d.Accelerator, Reason: d.Reason,
		})
	}
	if d, err := s.Host.DefaultDriver(); err == nil {
		f.DefaultDriver = d
	}
	for _, b := range s.Host.Broken() {
		f.BrokenRecords = append(f.BrokenRecords, &ingotv1.RecordFacts{Path: b.Path, Error: b.Err.Error()})
	}
	f.Containerd = s.containerd(ctx)
	f.Pool = poolFacts(s.Pool)
	var err error
	f.Interfaces, err = wire.Interfaces(owners)
	return f, err
}

func (s *hostService) containerd(ctx context.Context) *ingotv1.ContainerdFacts {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := s.Images.Facts(ctx)
	if err != nil {
		return &ingotv1.ContainerdFacts{Socket: c.Socket, Error: err.Error()}
	}
	return &ingotv1.ContainerdFacts{
		Socket: c.Socket, Version: c.Version, Serving: true, Namespace: c.Namespace, Snapshotter: c.Snapshotter,
		Images: int32(len(c.Images)), Leases: int32(len(c.Leases)), Snapshots: int32(c.Snapshots),
		Content: int32(c.Content), ContentBytes: c.ContentBytes, ImageNames: c.Images, LeaseIds: c.Leases,
	}
}

func poolFacts(dir string) *ingotv1.PoolFacts {
	p, err := pool.ReadFacts(dir)
	if err != nil {
		return &ingotv1.PoolFacts{Path: dir}
	}
	kind := "reflink"
	if p.Image != "" {
		kind = "loop"
	}
	full := ""
	if err := p.Full(); err != nil {
		full = err.Error()
	}
	return &ingotv1.PoolFacts{
		Full: full, Low: p.Low(),
		Path: p.Path, Kind: kind, SizeBytes: p.Size, UsedBytes: p.Used, BackingFreeBytes: p.Backing, Reflink: true,
	}
}

// memory reads proc_meminfo(5), and when the machine was started.
func memory(f *ingotv1.HostFacts) {
	file, err := os.Open("/proc/meminfo")
	if err == nil {
		defer file.Close()
		for lines := bufio.NewScanner(file); lines.Scan(); {
			key, rest, _ := strings.Cut(lines.Text(), ":")
			var kib int64
			fmt.Sscan(rest, &kib)
			switch key {
			case "MemTotal":
				f.MemoryBytes = kib << 10
			case "MemAvailable":
				f.MemoryAvailableBytes = kib << 10
			}
		}
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		f.BootTime = timestamppb.New(time.Now().Add(-time.Duration(info.Uptime) * time.Second))
	}
}
