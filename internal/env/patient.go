package env

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"

	"ingot/internal/doctor"
	"ingot/internal/hub"
	"ingot/internal/lab"
)

// Patient is this machine, as an environment needs it that is there, or is to be.
func Patient(name string) (doctor.Patient, error) {
	binary, err := os.Executable()
	if err != nil {
		return doctor.Patient{}, err
	}
	e, err := Open(name)
	exists := err == nil
	switch {
	case errdefs.IsNotFound(err), errors.Is(err, fs.ErrPermission): // the check of root says the latter
		e = Env{Name: name, Subnet: usualSubnet, Uplink: usualUplink, Machines: usualMachines()}
	case err != nil:
		return doctor.Patient{}, err
	}
	return e.patient(binary, exists)
}

func (e Env) patient(binary string, exists bool) (doctor.Patient, error) {
	l := e.Lab(binary)
	p := doctor.Patient{
		Dir: Root, Exists: exists, Device: l.Device(), CA: e.CAFile(), Hosts: len(e.Hosts()),
	}
	if e.Subnet.IsValid() {
		p.Networks = append(p.Networks, e.networks()...)
	}
	all, err := others(e.Name)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return p, err
	}
	for _, other := range all {
		p.Taken = append(p.Taken, other.networks()...)
		p.Others = append(p.Others, other.Lab(binary).Device())
	}
	if !exists {
		return p, nil
	}
	for i, s := range l.States() {
		if s.Up {
			p.Machines = append(p.Machines, e.Machines[i].patient(l, s.Machine.Roles))
		}
	}
	return p, nil
}

func (m Machine) patient(l *lab.Lab, roles []lab.Role) doctor.Machine {
	var args [][]string
	for _, r := range roles {
		args = append(args, r.Args)
	}
	var ports []doctor.Port
	if m.Hub {
		ports = append(ports, doctor.Port{Protocol: "udp", Number: 67}, doctor.Port{Protocol: "udp", Number: 53}, doctor.Port{Protocol: "tcp", Number: 53},
			doctor.Port{Protocol: "tcp", Number: hub.RegistryPort}, doctor.Port{Protocol: "tcp", Number: hub.GRPCPort}, doctor.Port{Protocol: "tcp", Number: hub.OwnMetrics})
	}
	if m.Host {
		ports = append(ports, doctor.Port{Protocol: "tcp", Number: hub.HostPort}, doctor.Port{Protocol: "tcp", Number: hub.MetricsPort})
	}
	return doctor.Machine{
		Name: m.Name, Hub: m.Hub, Address: m.Address, Segment: lab.Segment, Ports: ports, Roles: args,
		Inside: func(f func() error) error { return l.Inside(m.Name, f) },
	}
}

// needs finds all that `ingot up` lacks on this machine. Subnets are not its
// affair: decide chooses them.
func (u *up) needs(ctx context.Context) (Objections, error) {
	was, err := Open(u.name)
	if err != nil {
		was = Env{Name: u.name, Machines: usualMachines()}
		if u.Declared != nil {
			was.Machines = u.Declared.Machines
		}
	}
	p, err := was.patient(u.Binary, err == nil)
	if err != nil {
		return nil, err
	}
	p.Networks = nil
	var missing Objections
	for _, f := range doctor.Look(ctx, p, doctor.Stops()).Checks {
		if f.Status == doctor.Fail {
			missing = append(missing, refuse(errdefs.ErrFailedPrecondition, "%s: %s: %s%s", f.Name, f.Detail, f.Fix, offer(f)))
		}
	}
	return missing, nil
}

func offer(f doctor.Finding) string {
	if !f.Fixable {
		return ""
	}
	return fmt.Sprintf(" (or: `ingot doctor --fix %s`)", f.Name)
}
