package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/api/types"
)

const (
	// cleanUp is how long a microVM of --rm may take to go.
	cleanUp = time.Minute
	// mostStarts is how often a microVM may end before it is given up.
	mostStarts = 3
	// farewell is how long its guest is asked before.
	farewell = 2 * time.Second
)

// runOptions is what `ingot run` was asked for, beside the microVM itself.
type runOptions struct {
	specFlags
	image      string
	pull       string
	command    []string
	rm         bool
	stdin, tty bool
	timeout    time.Duration
	access     access
}

func runCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run IMAGE [-- COMMAND…]",
		Short: "Boot a microVM from an image",
		Long: `Boot a microVM from an OCI image, on the host with most room, and say its address.

The image's process runs as its configuration says: entrypoint, environment, user,
directory, signal to stop by. COMMAND takes the place of its CMD. With -i, -t or --rm
it is joined to this terminal, its exit code becomes that of ingot, and its end is
the microVM's; --rm then deletes that, unless this ingot is killed. An image with an
init of its own gets COMMAND beside that.`,
		Example: `  ingot run busybox
  ingot run busybox --rm -it -- sh
  ingot run -p 8080:80 busybox -- httpd -f
  ingot run --rm -e LANG=C -u nobody --entrypoint env busybox`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.image = args[0]
			if o.command, err = commandAfter(cmd, args); err != nil {
				return err
			}
			spec, err := o.spec(cmd, o.image, o.command)
			if err == nil {
				o.access, err = o.specFlags.access(cmd)
			}
			if err == nil {
				err = errors.Join(checkPolicy(cmd, o.pull), checkTerminal(cmd, o.stdin, o.tty))
			}
			if err != nil {
				return err
			}
			if o.attached() {
				if spec.Process == nil {
					spec.Process = &types.Process{}
				}
				spec.Process.Attach = true
			}
			return withCloud(cmd, func(c *cloud) error { return c.run(cmd, o, spec) })
		},
	}
	o.register(cmd)
	f := cmd.Flags()
	f.BoolVar(&o.rm, "rm", false, "delete the microVM at the end")
	f.BoolVarP(&o.stdin, "stdin", "i", false, "pass standard input to the command")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	pullFlag(cmd, &o.pull)
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "how long it may take to be up")
	return cmd
}

// attached says whether the process is joined to this terminal.
func (o *runOptions) attached() bool { return o.stdin || o.tty || o.rm }

func (c *cloud) run(cmd *cobra.Command, o runOptions, spec *types.MicroVMSpec) (err error) {
	// A closed terminal and a reader that has gone are as an interrupt: with --rm
	// there is a microVM to remove.
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	p := newProgress()
	defer p.clear()
	host, err := c.choose(ctx, o.host, spec)
	if err != nil {
		return err
	}
	boot, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("not up after %s", o.timeout))
	defer cancel()
	if err := errors.Join(c.addKey(ctx, spec), c.publishable(ctx, o.access.ports)); err != nil {
		return err
	}
	if err := pull(boot, host, p, o.pull, spec); err != nil {
		return err
	}
	vm, err := c.create(ctx, host, spec)
	if err != nil {
		return err
	}
	at, err := c.give(ctx, vm, o.access)
	if err != nil {
		return err
	}
	if o.rm {
		defer func() {
			if failed := c.farewellTo(ctx, vm); failed != nil && err == nil {
				err = failed
			} else if failed != nil { // the command's own exit code is worth more
				fmt.Fprintln(os.Stderr, "ingot:", explain(failed, c.name))
			}
		}()
	}
	if vm, err = up(boot, vm, p); err != nil {
		if cause := context.Cause(boot); boot.Err() != nil && ctx.Err() == nil {
			err = cause
		}
		return fmt.Errorf("boot %s on %s: %w (%s)", vm, host.Name, err, c.afterFailure(ctx, vm, o.rm))
	}
	ip := address(vm.MicroVM, nil)
	for _, line := range at {
		p.line("%s", line)
	}
	switch {
	case o.attached():
		p.line("%s is up on %s at %s", vm, host.Name, ip)
		err := attach(ctx, vm, o.start(vm))
		var code exitCode
		if !o.rm && (err == nil || errors.As(err, &code)) {
			settle(ctx, vm)
		}
		return err
	case state(vm.GetStatus()) == "stopped": // a process that was quicker than we
		fmt.Fprintln(cmd.OutOrStdout(), vm)
		fmt.Fprintf(os.Stderr, "next: %s logs %s\n", program(c.name), vm)
		return ended(vm)
	}
	p.line("%s is up on %s at %s", vm, host.Name, ip)
	fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", vm, ip)
	fmt.Fprintf(os.Stderr, "next: %s exec %s -- sh\n", program(c.name), vm)
	return nil
}

// afterFailure says what there is to do about a microVM that is not up. One that
// failed before its guest began never will be: nothing of it is worth keeping.
func (c *cloud) afterFailure(ctx context.Context, vm microVM, rm bool) string {
	hint := fmt.Sprintf("`ingot logs %s` shows its boot log", vm)
	remove := fmt.Sprintf("`ingot rm %s` removes it", vm)
	switch {
	case state(vm.GetStatus()) == "failed" && vm.GetStatus().GetStartedAt() == nil:
		if rm {
			return "it is deleted again"
		}
		if err := c.farewellTo(ctx, vm); err != nil {
			return fmt.Sprintf("%s; it is not deleted: %s", remove, explain(err, c.name))
		}
		return "it is deleted again"
	case rm:
		return hint
	}
	return hint + ", " + remove
}

// settle waits until a microVM whose process has ended has ended too, so that what
// is asked of it next is not asked of a guest that powers off. One whose image has an
// init of its own goes on.
func settle(ctx context.Context, vm microVM) {
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	watch, err := vm.host.Watch(ctx, &ingotv1.WatchRequest{Uid: vm.uid()})
	for err == nil && state(vm.GetStatus()) == "running" {
		var r *ingotv1.WatchResponse
		if r, err = watch.Recv(); err == nil {
			vm.MicroVM = r.GetMicrovm()
		}
	}
}

// ended is the end of a microVM's own process as ours.
func ended(vm microVM) error {
	if code := vm.GetStatus().GetExitCode(); code != 0 {
		return exitCode(code)
	}
	return nil
}

// start asks for the microVM's own process, which waits for it.
func (o *runOptions) start(vm microVM) *ingotv1.ExecStart {
	return &ingotv1.ExecStart{Uid: vm.uid(), Main: true, Env: map[string]string{}, Tty: o.tty, Stdin: o.stdin}
}

// choose finds a host and a name for a microVM.
func (c *cloud) choose(ctx context.Context, wanted string, spec *types.MicroVMSpec) (*hostClient, error) {
	var host *hostClient
	var vms []microVM
	var placeErr, listErr error
	var wg sync.WaitGroup
	wg.Go(func() { host, placeErr = c.place(ctx, wanted, spec) })
	wg.Go(func() { vms, listErr = c.list(ctx, spec.GetNamespace()) })
	wg.Wait()
	if placeErr != nil {
		return nil, placeErr
	}
	if listErr != nil {
		// One host's silence must not keep another from booting a microVM.
		fmt.Fprintln(os.Stderr, "ingot:", explain(listErr, c.name))
	}
	taken := map[string]bool{}
	for _, vm := range vms {
		taken[vm.GetSpec().GetId()] = true
		if vm.GetSpec().GetId() == spec.GetId() {
			return nil, fmt.Errorf("create %s: %w on %s", vm, errdefs.ErrAlreadyExists, vm.host.Name)
		}
	}
	if spec.GetId() == "" {
		spec.Id = freeName(taken)
	}
	return host, nil
}

// pull fetches the images ahead, for the progress that a create does not show.
func pull(ctx context.Context, host *hostClient, p *progress, policy string, spec *types.MicroVMSpec) error {
	list := []string{spec.GetKernel().GetImage(), spec.GetRootVolume().GetSource().GetContainerSource()}
	return pullAll(ctx, host, p, policy, slices.Compact(list))
}

// create makes a microVM. An interrupt does not reach it: nobody would know whether
// there is one now.
func (c *cloud) create(ctx context.Context, host *hostClient, spec *types.MicroVMSpec) (microVM, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
	defer cancel()
	r, err := host.CreateMicroVM(ctx, &v1alpha1.CreateMicroVMRequest{Microvm: spec})
	if err != nil {
		return microVM{}, fmt.Errorf("create %s/%s on %s: %w", spec.GetNamespace(), spec.GetId(), host.Name, err)
	}
	vm := microVM{r.GetMicrovm(), host}
	return vm, c.yield(ctx, vm)
}

// yield deletes a new microVM again if another host has one of its name that stays: two
// that ask for the same name at the same time get two hosts. Who has the smaller uid came
// first; the other one goes, if it has seen this one. It has not if it looked before this
// one was on record, and then it is this one that goes.
func (c *cloud) yield(ctx context.Context, vm microVM) error {
	for deadline := time.Now().Add(rivalPatience); ; {
		all, err := c.list(ctx, vm.GetSpec().GetNamespace())
		if err != nil {
			return nil // choose has said who is silent
		}
		at := slices.IndexFunc(all, func(other microVM) bool {
			return other.GetSpec().GetId() == vm.GetSpec().GetId() && other.uid() != vm.uid() && state(other.GetStatus()) != "deleting"
		})
		if at < 0 {
			return nil
		}
		if other := all[at]; other.uid() < vm.uid() || !time.Now().Before(deadline) {
			err := fmt.Errorf("create %s: %w on %s", vm, errdefs.ErrAlreadyExists, other.host.Name)
			if failed := c.remove(ctx, vm); failed != nil {
				err = fmt.Errorf("%w; delete it again on %s: %w", err, vm.host.Name, failed)
			}
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil // it is there, and may be one of two
		}
	}
}

// rivalPatience is how long one of the same name may take to begin to go.
const rivalPatience = 3 * time.Second

// up waits until a microVM runs, its agent answers and it has an address, or
// its process has ended already.
func up(ctx context.Context, vm microVM, p *progress) (microVM, error) {
	return observe(ctx, vm, func() { p.say("wait for the host's daemon", "") }, func(vm microVM) (bool, error) {
		st := vm.GetStatus()
		switch state(st) {
		case "running":
			if address(vm.MicroVM, nil) != "" && st.GetAgentReady() {
				return true, nil
			}
			p.say("wait for the address", "")
		case "failed":
			return false, errors.New(st.GetReason())
		case "stopped":
			if st.GetStartedAt() == nil {
				return false, errors.New("somebody stopped it")
			}
			return true, nil
		case "deleting":
			return false, errors.New("somebody deletes it")
		default:
			if st.GetRestarts() >= mostStarts {
				return false, fmt.Errorf("it has ended %d times before it was up: %s", st.GetRestarts(), st.GetReason())
			}
			p.say(stepWords(st))
		}
		return false, nil
	})
}

// observe shows what is so of a microVM, and each change, until see has seen enough. A
// daemon that goes meanwhile is waited for.
func observe(ctx context.Context, vm microVM, gone func(), see func(microVM) (enough bool, err error)) (microVM, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		watch, err := vm.host.Watch(ctx, &ingotv1.WatchRequest{Uid: vm.uid()}, grpc.WaitForReady(true))
		for err == nil {
			var r *ingotv1.WatchResponse
			if r, err = watch.Recv(); err != nil {
				break
			}
			vm.MicroVM = r.GetMicrovm()
			enough, err := see(vm)
			if enough || err != nil {
				return vm, err
			}
		}
		if c := status.Code(err); c != codes.Unavailable && c != codes.Canceled || ctx.Err() != nil {
			return vm, err
		}
		gone()
	}
}

// stepWords says what a host is doing for a microVM, and how far it is: a step
// may have a number after it.
func stepWords(st *types.MicroVMStatus) (step, detail string) {
	if st.GetRetry() > 0 && st.GetReason() != "" {
		return "try again after: " + st.GetReason(), ""
	}
	name, detail, _ := strings.Cut(st.GetStep(), " ")
	step = map[string]string{
		"pull": "prepare the images", "unpack": "prepare the images", "queue": "wait until other images are here", "volume": "make the volume", "network": "make the interfaces", "turn": "wait until others have booted", "boot": "boot",
	}[name]
	return cmp.Or(step, st.GetStep(), state(st)), detail
}

// farewellTo stops and deletes a microVM of --rm, also when ctx has ended.
func (c *cloud) farewellTo(ctx context.Context, vm microVM) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
	defer cancel()
	if err := stop(ctx, vm, farewell); err != nil && !gone(err) {
		fmt.Fprintf(os.Stderr, "ingot: stop %s: %s\n", vm, explain(err, c.name))
	}
	if err := c.remove(ctx, vm); err != nil && !gone(err) {
		return fmt.Errorf("delete %s on %s: %w", vm, vm.host.Name, err)
	}
	return nil
}
