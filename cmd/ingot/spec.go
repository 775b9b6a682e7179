package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ingot/api/types"
)

// specFlags are the flags that describe a microVM to be.
type specFlags struct {
	name, namespace, host, kernel, driver string
	cpus                                  int32
	memory                                string
	env, labels                           []string
	restart                               string
	file                                  string // of `vm create -f`
}

func (f *specFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.name, "name", "", "name (default: two words)")
	flags.StringVarP(&f.namespace, "namespace", "n", defaultNamespace, "namespace")
	flags.StringVar(&f.host, "host", "", "host (default: the one with most room)")
	flags.StringVar(&f.kernel, "kernel", "kernel", "image with boot/vmlinux and boot/initrd")
	flags.StringVar(&f.driver, "driver", "", "driver (default: the host's)")
	flags.Int32Var(&f.cpus, "cpus", 1, "virtual CPUs")
	flags.StringVarP(&f.memory, "memory", "m", "256", "memory in MiB, or with a unit: 512M, 2G")
	flags.StringArrayVarP(&f.env, "env-var", "e", nil, "set a variable of the command: KEY=VALUE")
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "label: KEY=VALUE")
	flags.StringVar(&f.restart, "restart", "always", "start it again after a crash or reboot (always), a crash (on-failure), never")
	flags.SetInterspersed(false)
	_ = cmd.RegisterFlagCompletionFunc("restart", cobra.FixedCompletions([]string{"always", "on-failure", "never"}, cobra.ShellCompDirectiveNoFileComp))
}

var restartPolicies = map[string]types.RestartPolicy{
	"always": types.RestartPolicy_ALWAYS, "on-failure": types.RestartPolicy_ON_FAILURE, "never": types.RestartPolicy_NEVER,
}

// spec is the microVM that the flags describe; process is what it runs, empty
// for the image's own.
func (f *specFlags) spec(cmd *cobra.Command, image string, process []string) (*types.MicroVMSpec, error) {
	memory, err := parseMemory(f.memory)
	if err != nil {
		return nil, misused(cmd, "--memory %s: %w", f.memory, err)
	}
	if f.cpus < 1 {
		return nil, misused(cmd, "--cpus %d: a microVM needs one", f.cpus)
	}
	policy, ok := restartPolicies[f.restart]
	if !ok {
		return nil, misused(cmd, "--restart %s: it must be always, on-failure or never", f.restart)
	}
	env, err := variables(cmd, f.env)
	if err != nil {
		return nil, err
	}
	labels := map[string]string{}
	for _, pair := range f.labels {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, misused(cmd, "--label %s: it must be KEY=VALUE", pair)
		}
		labels[key] = value
	}
	spec := &types.MicroVMSpec{
		Id: f.name, Namespace: cmp.Or(f.namespace, defaultNamespace), Labels: labels,
		Vcpu: f.cpus, MemoryInMb: memory,
		Kernel:          &types.Kernel{Image: f.kernel, Filename: new("boot/vmlinux"), AddNetworkConfig: true},
		Initrd:          &types.Initrd{Image: f.kernel, Filename: new("boot/initrd")},
		RootVolume:      &types.Volume{Id: "root", Source: &types.VolumeSource{ContainerSource: &image}},
		Interfaces:      []*types.NetworkInterface{{DeviceId: "eth1", Type: types.NetworkInterface_TAP}},
		AllowGuestAgent: true,
		RestartPolicy:   policy.Enum(),
	}
	if f.driver != "" {
		spec.Provider = &f.driver
	}
	if len(process) > 0 || len(env) > 0 {
		spec.Process = &types.Process{Args: process, Env: env}
	}
	return spec, nil
}

// parseMemory reads a quantity of memory as MiB.
func parseMemory(s string) (int32, error) {
	number, factor := s, int64(1)
	for suffix, f := range map[string]int64{"M": 1, "MiB": 1, "G": 1 << 10, "GiB": 1 << 10} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			number, factor = n, f
		}
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n <= 0 || n > (1<<31-1)/factor {
		return 0, fmt.Errorf("it must be a number of MiB, or one with M or G")
	}
	return int32(n * factor), nil
}

// The two words of a name that nobody chose.
var (
	firstWords  = strings.Fields("bold brisk calm clear crisp deft eager fair fleet fond glad keen kind lucid merry mild neat nimble prime quick quiet sharp sleek snug solid spry stout swift tidy vivid warm wise")
	secondWords = strings.Fields("adder badger bison crane dingo eagle egret finch gecko heron ibex jackal kite koala lemur lynx marten mole newt otter owl panda puma quail raven robin seal shrew stoat tapir vole wren")
)

// freeName is a name of two words that taken does not have.
func freeName(taken map[string]bool) string {
	for n := 0; ; n++ {
		name := firstWords[rand.IntN(len(firstWords))] + "-" + secondWords[rand.IntN(len(secondWords))]
		if n > 20 {
			name += "-" + strconv.Itoa(n)
		}
		if !taken[name] {
			return name
		}
	}
}
