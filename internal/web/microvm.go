package web

import (
	"slices"

	dto "github.com/prometheus/client_model/go"

	"ingot/internal/host"
)

// What is told of each microVM, labelled with its namespace, name and uid.
var (
	vmVCPUs     = gauge("ingot_microvm_vcpus", "Virtual CPUs of the microVM.")
	vmMemory    = gauge("ingot_microvm_memory_bytes", "Memory that the guest has.")
	vmRestarts  = total("ingot_microvm_restarts_total", "How often the microVM was started again because its guest had ended.")
	vmStarted   = gauge("ingot_microvm_start_time_seconds", "When the hypervisor was started, since the Unix epoch.")
	vmCPU       = total("ingot_microvm_cpu_seconds_total", "CPU time of the hypervisor, with its guest's.")
	vmResident  = gauge("ingot_microvm_resident_memory_bytes", "Memory that the hypervisor holds, with what its guest has touched.")
	vmRead      = total("ingot_microvm_storage_read_bytes_total", "Bytes that the hypervisor has had read from storage: what was in the page cache is none of it.")
	vmWritten   = total("ingot_microvm_storage_written_bytes_total", "Bytes that the hypervisor has had written to storage.")
	vmVolume    = gauge("ingot_microvm_volume_size_bytes", "Size of the volume.")
	vmAllocated = gauge("ingot_microvm_volume_allocated_bytes", "What the volume takes in the pool, with what it shares with its image.")
	vmBytesIn   = total("ingot_microvm_network_receive_bytes_total", "Bytes that the guest was sent.")
	vmFramesIn  = total("ingot_microvm_network_receive_packets_total", "Packets that the guest was sent.")
	vmBytesOut  = total("ingot_microvm_network_transmit_bytes_total", "Bytes that the guest has sent.")
	vmFramesOut = total("ingot_microvm_network_transmit_packets_total", "Packets that the guest has sent.")
)

// microVM adds what a microVM uses. Its labels are made once for all of it.
func (f families) microVM(u host.Usage) {
	own := []*dto.LabelPair{label("namespace", u.Spec.Namespace), label("name", u.Spec.Name), label("uid", u.Spec.UID)}
	and := func(name, value string) []*dto.LabelPair { return append(slices.Clip(own), label(name, value)) }
	f.add(vmVCPUs, float64(u.Spec.VCPU), own...)
	f.add(vmMemory, float64(u.Spec.Memory.Bytes()), own...)
	f.add(vmRestarts, float64(u.Status.Restarts), own...)
	if p := u.Process; p != nil {
		f.add(vmStarted, float64(u.Status.StartedAt.UnixMilli())/1000, own...)
		f.add(vmCPU, p.CPU.Seconds(), own...)
		f.add(vmResident, float64(p.Resident), own...)
		if p.Read >= 0 {
			f.add(vmRead, float64(p.Read), own...)
			f.add(vmWritten, float64(p.Written), own...)
		}
	}
	for _, d := range u.Disks {
		labels := and("volume", d.ID)
		f.add(vmVolume, float64(d.Size), labels...)
		f.add(vmAllocated, float64(d.Allocated), labels...)
	}
	for _, l := range u.Links {
		labels := and("interface", l.ID)
		f.add(vmBytesIn, float64(l.ReceivedBytes), labels...)
		f.add(vmFramesIn, float64(l.ReceivedPackets), labels...)
		f.add(vmBytesOut, float64(l.SentBytes), labels...)
		f.add(vmFramesOut, float64(l.SentPackets), labels...)
	}
}
