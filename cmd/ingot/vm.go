package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/internal/vm"
)

// vmCommand is `ingot vm …`.
func vmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "Create, look at and end microVMs",
	}
	list := psCommand()
	list.Use, list.Aliases = "list", []string{"ls"}
	remove := rmCommand()
	remove.Use, remove.Aliases = "delete NAME…", []string{"rm"}
	cmd.AddCommand(vmCreateCommand(), list, vmGetCommand(), vmStartCommand(), vmStopCommand(), vmRestartCommand(),
		vmPauseCommand(), vmResumeCommand(), vmLabelCommand(), vmAllowCommand(), vmEgressCommand(), vmResizeCommand(), remove,
		logsCommand(), consoleCommand(), execCommand())
	return cmd
}

// naming is what the help of commands that take a microVM says of its name.
const naming = "A microVM is NAME, NAMESPACE/NAME, or its uid or the beginning of it."

// inCloud opens the environment around a command.
func inCloud(f func(cmd *cobra.Command, c *cloud, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		return withCloud(cmd, func(c *cloud) error { return f(cmd, c, args) })
	}
}

// withCloud is for a command that has something to say before it needs the
// environment: that it was misused.
func withCloud(cmd *cobra.Command, f func(c *cloud) error) error {
	c, err := openCloud(environment(cmd))
	if err != nil {
		return err
	}
	defer c.close()
	return f(c)
}

func psCommand() *cobra.Command {
	var out *output
	var namespace, labels string
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List microVMs",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			selector, err := vm.ParseSelector(labels)
			if err != nil {
				return misused(cmd, "--selector: %w", err)
			}
			return withCloud(cmd, func(c *cloud) error { return c.ps(cmd, namespace, selector, out) })
		},
	}
	out = outputFlag(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only this namespace")
	cmd.Flags().StringVarP(&labels, "selector", "l", "", "only with these labels: key=value, key!=value, key, !key, with commas between them")
	return cmd
}

// ps shows those microVMs that the hosts which answer have.
func (c *cloud) ps(cmd *cobra.Command, namespace string, selector vm.Selector, out *output) error {
	ctx := cmd.Context()
	var leases map[string]*ingotv1.Lease
	var wg sync.WaitGroup
	wg.Go(func() { leases = c.leases(ctx) })
	vms, err := c.list(ctx, namespace)
	wg.Wait()
	vms = slices.DeleteFunc(vms, func(v microVM) bool { return !selector.Matches(v.GetSpec().GetLabels()) })
	views := make([]vmView, len(vms))
	for i, vm := range vms {
		views[i] = view(vm, leases)
	}
	return errors.Join(out.write(cmd.OutOrStdout(), views, func(w io.Writer) error { return vmTable(w, views) }), err)
}

func vmTable(w io.Writer, views []vmView) error {
	rows := make([][]string, len(views))
	for i, v := range views {
		driver := v.Driver
		if v.Accelerator != "" {
			driver += "/" + v.Accelerator
		}
		rows[i] = []string{v.Namespace, v.Name, v.Host, v.State, v.IP, driver, since(v.Created)}
	}
	return table(w, "NAMESPACE NAME HOST STATE IP DRIVER AGE", rows)
}

// since is an age in its largest unit.
func since(t *time.Time) string {
	if t == nil {
		return ""
	}
	d := max(0, time.Since(*t))
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func vmGetCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:               "get NAME",
		Short:             "Show one microVM",
		Long:              "Show one microVM. " + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			vm, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			v := view(vm, c.leases(cmd.Context()))
			return out.write(cmd.OutOrStdout(), v, func(w io.Writer) error {
				yaml := asYAML // of one microVM there is too much for a row
				return yaml.write(w, v, nil)
			})
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

// each is a command that does one thing to each of some microVMs.
func each(verb, short, long string, do func(ctx context.Context, vm microVM) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME…", Short: short, Long: long + " " + naming,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error { return c.each(cmd, args, verb, do) }),
	}
}

// eachInTime is one of them that takes a time for the guest to end by itself.
func eachInTime(verb, short, long string, do func(ctx context.Context, vm microVM, timeout time.Duration) error) *cobra.Command {
	var timeout time.Duration
	cmd := each(verb, short, long, func(ctx context.Context, vm microVM) error { return do(ctx, vm, timeout) })
	cmd.Flags().DurationVarP(&timeout, "timeout", "t", 30*time.Second, "how long the guest is asked before its power is cut; 0 cuts it at once")
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if timeout < 0 {
			return misused(cmd, "--timeout is %s; it cannot be negative", timeout)
		}
		return run(cmd, args)
	}
	return cmd
}

func vmStartCommand() *cobra.Command {
	return each("start", "Boot stopped microVMs", "Boot stopped microVMs.", func(ctx context.Context, vm microVM) error {
		_, err := vm.host.Start(ctx, &ingotv1.StartRequest{Uid: vm.uid()})
		return err
	})
}

func vmStopCommand() *cobra.Command {
	return eachInTime("stop", "Shut microVMs down; they stay there and can be started again", "Shut microVMs down and wait until they are.", stop)
}

func vmRestartCommand() *cobra.Command {
	return eachInTime("restart", "Shut microVMs down and boot them again", "Shut microVMs down and boot them again, with the disks that they have.",
		func(ctx context.Context, vm microVM, timeout time.Duration) error {
			_, err := vm.host.Restart(ctx, &ingotv1.RestartRequest{Uid: vm.uid(), Timeout: durationpb.New(timeout)})
			return err
		})
}

func vmPauseCommand() *cobra.Command {
	return each("pause", "Have the CPUs of microVMs stand still", "Have the CPUs of microVMs stand still, until `ingot vm resume`.",
		func(ctx context.Context, vm microVM) error {
			_, err := vm.host.Pause(ctx, &ingotv1.PauseRequest{Uid: vm.uid()})
			return err
		})
}

func vmResumeCommand() *cobra.Command {
	return each("resume", "Have paused microVMs go on", "Have paused microVMs go on.", func(ctx context.Context, vm microVM) error {
		_, err := vm.host.Resume(ctx, &ingotv1.ResumeRequest{Uid: vm.uid()})
		return err
	})
}

func vmLabelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "label NAME KEY=VALUE… KEY-…",
		Short: "Set a microVM's labels, and remove those of KEY-",
		Long:  "Set a microVM's labels, and remove those of KEY-. `ingot ps -l` finds microVMs by them. " + naming,
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &ingotv1.UpdateRequest{Labels: map[string]string{}}
			for _, arg := range args[1:] {
				key, value, set := strings.Cut(arg, "=")
				removed, remove := strings.CutSuffix(arg, "-")
				switch {
				case set && key != "":
					r.Labels[key] = value
				case !set && remove && removed != "":
					r.RemoveLabels = append(r.RemoveLabels, removed)
				default:
					return misused(cmd, "%s is neither KEY=VALUE nor KEY-", arg)
				}
			}
			return withCloud(cmd, func(c *cloud) error {
				return c.each(cmd, args[:1], "label", func(ctx context.Context, vm microVM) error {
					r.Uid = vm.uid()
					_, err := vm.host.Update(ctx, r)
					return err
				})
			})
		},
	}
}

func vmAllowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "allow NAME ADDRESS… ADDRESS-…",
		Short: "Let a microVM's guest use other addresses than its own, or those of ADDRESS- no more",
		Long: `Let a microVM's guest use other addresses than its own, or those of ADDRESS- no more, at
once: 192.168.10.25 for a cluster that has this one in common, 10.42.0.0/16 for what is behind a
router. ` + naming,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &ingotv1.UpdateRequest{}
			for _, arg := range args[1:] {
				text, remove := strings.CutSuffix(arg, "-")
				if _, err := vm.ParseAddress(text); err != nil {
					return misused(cmd, "%w", err)
				}
				if remove {
					r.DisallowAddresses = append(r.DisallowAddresses, text)
				} else {
					r.AllowAddresses = append(r.AllowAddresses, text)
				}
			}
			return withCloud(cmd, func(c *cloud) error {
				return c.each(cmd, args[:1], "allow addresses to", func(ctx context.Context, vm microVM) error {
					r.Uid = vm.uid()
					_, err := vm.host.Update(ctx, r)
					return err
				})
			})
		},
	}
}

func stop(ctx context.Context, vm microVM, timeout time.Duration) error {
	return patiently(ctx, func() error {
		_, err := vm.host.Stop(ctx, &ingotv1.StopRequest{Uid: vm.uid(), Timeout: durationpb.New(timeout)})
		return err
	})
}

func rmCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm NAME…",
		Short:             "Delete microVMs with all that is theirs",
		Long:              "Delete microVMs and wait until nothing is left of them. " + naming,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			return c.each(cmd, args, "delete", c.remove)
		}),
	}
}

// remove deletes a microVM and returns when nothing of it is left, its addresses
// included.
func (c *cloud) remove(ctx context.Context, vm microVM) error {
	err := patiently(ctx, func() error { return destroy(ctx, vm) })
	if err == nil || gone(err) {
		c.releaseLeases(ctx, vm)
	}
	return err
}

// patiently does something again while the host's daemon is away: one that was
// killed is started again.
func patiently(ctx context.Context, f func() error) error {
	patience := time.After(daemonPatience)
	for {
		err := f()
		if status.Code(err) != codes.Unavailable {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-patience:
			return err
		case <-time.After(daemonPause):
		}
	}
}

const (
	daemonPatience = 10 * time.Second
	daemonPause    = 200 * time.Millisecond
)

// destroy is one try to remove a microVM.
func destroy(ctx context.Context, vm microVM) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The watch begins first: what is gone already cannot be watched any more.
	watch, err := vm.host.Watch(ctx, &ingotv1.WatchRequest{Uid: vm.uid()})
	if err != nil {
		return err
	}
	if _, err := vm.host.DeleteMicroVM(ctx, &v1alpha1.DeleteMicroVMRequest{Uid: vm.uid()}); err != nil && !gone(err) {
		return err
	}
	for err == nil {
		_, err = watch.Recv()
	}
	if gone(err) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// releaseLeases gives back what a microVM had that is gone, so that another one of
// its name has the name at once. It is no error if that fails: leases end.
func (c *cloud) releaseLeases(ctx context.Context, vm microVM) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, i := range vm.GetStatus().GetNetworkInterfaces() {
		_, _ = c.hub.ReleaseLease(ctx, &ingotv1.ReleaseLeaseRequest{Mac: i.GetGuestMac()})
	}
}

// each does something to several microVMs at the same time, and prints the name
// of each with which it was done.
func (c *cloud) each(cmd *cobra.Command, args []string, verb string, f func(context.Context, microVM) error) error {
	ctx := cmd.Context()
	// With one wrong name nothing is done: it may have been meant for another.
	vms, err := c.findAll(ctx, args)
	if err != nil {
		return err
	}
	errs := make([]error, len(vms))
	var wg sync.WaitGroup
	var mu sync.Mutex // guards the output
	for i, vm := range vms {
		wg.Go(func() {
			if err := f(ctx, vm); err != nil {
				errs[i] = fmt.Errorf("%s %s on %s: %w", verb, vm, vm.host.Name, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			fmt.Fprintln(cmd.OutOrStdout(), vm)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// completeVMs completes the names of microVMs.
func completeVMs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c, err := openCloud(environment(cmd))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.close()
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	vms, _ := c.list(ctx, "")
	var found []string
	for _, vm := range vms {
		found = append(found, vm.String())
	}
	return found, cobra.ShellCompDirectiveNoFileComp
}
