package env

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/lab"
)

func (u *up) prepare(ctx context.Context) (err error) {
	if u.Plan == nil {
		u.Plan = u.Out
	}
	if u.Binary == "" {
		if u.Binary, err = os.Executable(); err != nil {
			return err
		}
	}
	u.missing, err = u.needs(ctx)
	return err
}

// gatherFacts finds what is there: this environment, others, what runs.
func (u *up) gatherFacts(ctx context.Context) (string, error) {
	if u.missing != nil {
		return "not all can be seen", nil // check says why
	}
	var err error
	if !u.DryRun {
		if u.choice, err = lockMachine(ctx); err != nil {
			return "", err
		}
	}
	if u.others, err = others(u.name); err != nil {
		return "", err
	}
	was, err := Open(u.name)
	if errdefs.IsNotFound(err) {
		return "there is no environment yet", nil
	}
	if err != nil {
		return "", err
	}
	u.was = &was
	u.states = map[string]lab.State{}
	for _, s := range was.Lab(u.Binary).States() {
		u.states[s.Name] = s
	}
	u.askHosts(ctx)
	return fmt.Sprintf("%d machines, %d microVMs", len(was.Machines), len(u.have)), nil
}

// askHosts lists the microVMs of the hosts that run. After a reboot none does.
func (u *up) askHosts(ctx context.Context) {
	conns, err := u.was.Dial()
	if err != nil {
		for _, m := range u.was.Hosts() {
			u.silent = append(u.silent, m.Name)
		}
		return
	}
	defer conns.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	u.have, u.silent = list(ctx, conns, slices.DeleteFunc(u.was.Hosts(), func(m Machine) bool { return !u.states[m.Name].Up }))
	for _, m := range u.was.Hosts() {
		if !u.states[m.Name].Up {
			u.silent = append(u.silent, m.Name)
		}
	}
}

// list asks hosts for their microVMs, all at the same time.
func list(ctx context.Context, conns Conns, hosts []Machine) (have []placed, silent []string) {
	var mu sync.Mutex // guards have and silent
	var asking sync.WaitGroup
	for _, m := range hosts {
		asking.Go(func() {
			r, err := v1alpha1.NewMicroVMClient(conns.Hosts[m.Name]).ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent = append(silent, m.Name)
			}
			for _, vm := range r.GetMicrovm() {
				have = append(have, placed{m.Name, vm})
			}
		})
	}
	asking.Wait()
	slices.SortFunc(have, func(a, b placed) int { return strings.Compare(a.name(), b.name()) })
	slices.Sort(silent)
	return have, silent
}
