package env

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
	"ingot/internal/lab"
	"ingot/internal/vm"
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
	detail, err := u.lookAround(ctx)
	if u.missing != nil && err != nil {
		u.blind = true
		return "not all can be seen", nil // check says why
	}
	return detail, err
}

func (u *up) lookAround(ctx context.Context) (string, error) {
	var err error
	if !u.DryRun && u.missing == nil {
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

// askHosts lists the microVMs of the hosts that run, and finds those of the others
// in their files: after a reboot no host runs.
func (u *up) askHosts(ctx context.Context) {
	conns, err := u.was.Dial()
	if err != nil {
		conns = Conns{} // half of an environment: nobody can be asked
	}
	defer conns.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	ask := func(m Machine) bool { return u.states[m.Name].Up && conns.Hosts[m.Name] != nil }
	var silent map[string]error
	u.have, silent = list(ctx, conns, slices.DeleteFunc(u.was.Hosts(), func(m Machine) bool { return !ask(m) }))
	for _, m := range u.was.Hosts() {
		if silent[m.Name] != nil || !ask(m) {
			u.have = append(u.have, recorded(u.was.filesOf(m), m.Name)...)
		}
	}
}

// list asks hosts for their microVMs, all at the same time. Silent are those that
// did not answer, and why.
func list(ctx context.Context, conns Conns, hosts []Machine) (have []placed, silent map[string]error) {
	silent = map[string]error{}
	var mu sync.Mutex // guards have and silent
	var asking sync.WaitGroup
	for _, m := range hosts {
		asking.Go(func() {
			r, err := v1alpha1.NewMicroVMClient(conns.Hosts[m.Name]).ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent[m.Name] = err
			}
			for _, vm := range r.GetMicrovm() {
				have = append(have, placed{m.Name, vm})
			}
		})
	}
	asking.Wait()
	slices.SortFunc(have, func(a, b placed) int { return strings.Compare(a.name(), b.name()) })
	return have, silent
}

// recorded are the microVMs that a machine's files say it has. What cannot be read
// is the host's to complain about.
func recorded(files, host string) []placed {
	var all []placed
	for _, path := range records(files) {
		var r struct {
			Spec     vm.Spec
			Deleting bool
		}
		b, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(b, &r) != nil || r.Deleting {
			continue
		}
		all = append(all, placed{host, &types.MicroVM{Spec: &types.MicroVMSpec{
			Namespace: r.Spec.Namespace, Id: r.Spec.Name, Uid: &r.Spec.UID, Labels: r.Spec.Labels,
		}}})
	}
	return all
}

// filesOf is where a machine's own files are.
func (e Env) filesOf(m Machine) string { return filepath.Join(e.Dir(), "machines", m.Name) }

// records are the files in which a machine notes its microVMs, whether it runs or not.
func records(files string) []string {
	found, _ := filepath.Glob(filepath.Join(files, "var/lib/flintlock/vm/*/*/*/vm.json"))
	return found
}
