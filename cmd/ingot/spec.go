package main

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"ingot/api/types"
	"ingot/internal/env"
	"ingot/internal/vm"
	"ingot/internal/wire"
)

// specFlags are the flags that describe a microVM to be.
type specFlags struct {
	name, namespace, host, kernel, driver string
	cpus                                  int32
	memory                                string
	env, labels, addresses                []string
	restart, disk                         string
	entrypoint, user, dir, stopSignal     string
	userData                              string // a file
	publish, egress                       []string
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
	flags.StringVar(&f.disk, "disk", "", "least size of the root disk, as --memory (default: the host's)")
	flags.StringArrayVarP(&f.env, "env-var", "e", nil, "set a variable of the command: KEY=VALUE")
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "label: KEY=VALUE")
	flags.StringVar(&f.restart, "restart", "always", "start it again after a crash or reboot (always), a crash (on-failure), never")
	flags.StringArrayVar(&f.addresses, "allow-address", nil, "address or prefix that the guest may use beside its own")
	flags.StringVar(&f.entrypoint, "entrypoint", "", "run this in the place of the image's ENTRYPOINT and CMD; \"\": COMMAND alone")
	flags.StringVarP(&f.user, "user", "u", "", "user in the guest: name or id, and :group (default: the image's)")
	flags.StringVarP(&f.dir, "workdir", "w", "", "directory in the guest (default: the image's)")
	flags.StringVar(&f.stopSignal, "stop-signal", "", "signal that ends the process (default: the image's, else SIGTERM)")
	flags.StringVar(&f.userData, "user-data", "", "file with what cloud-init does in the guest: #cloud-config, or a script")
	flags.StringArrayVarP(&f.publish, "publish", "p", nil, "have a port of the hub lead to it: [ADDRESS:]PORT:TO[/udp]")
	flags.StringArrayVar(&f.egress, "egress", nil, "what it may open outside: 'allow|deny PREFIX|private|all [PORT/tcp]' (ingot vm egress --help)")
	flags.SetInterspersed(false)
	_ = cmd.RegisterFlagCompletionFunc("restart", cobra.FixedCompletions([]string{"always", "on-failure", "never"}, cobra.ShellCompDirectiveNoFileComp))
}

// spec is the microVM that the flags describe; process is what it runs, empty
// for the image's own.
func (f *specFlags) spec(cmd *cobra.Command, image string, process []string) (*types.MicroVMSpec, error) {
	memory, err := env.ParseMemory(f.memory)
	if err != nil {
		return nil, misused(cmd, "--memory %s: %w", f.memory, err)
	}
	if f.cpus < 1 {
		return nil, misused(cmd, "--cpus %d: a microVM needs one", f.cpus)
	}
	disk := int32(0)
	if f.disk != "" {
		if disk, err = env.ParseMemory(f.disk); err != nil {
			return nil, misused(cmd, "--disk %s: %w", f.disk, err)
		}
	}
	if _, ok := env.RestartPolicies[f.restart]; !ok {
		return nil, misused(cmd, "--restart %s: it must be always, on-failure or never", f.restart)
	}
	vars, err := variables(cmd, f.env)
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
	spec, err := env.MicroVM{
		Name: f.name, Namespace: f.namespace, Image: image, Kernel: f.kernel, Driver: f.driver, CPUs: f.cpus, Memory: memory, Disk: disk,
		Command: process, Env: vars, Labels: labels, Restart: f.restart, AllowedAddresses: f.addresses,
	}.Proto()
	if err != nil {
		return nil, err
	}
	if f.userData != "" {
		text, err := os.ReadFile(f.userData)
		if err != nil {
			return nil, fmt.Errorf("read user data: %w", err)
		}
		spec.Metadata = map[string]string{"user-data": base64.StdEncoding.EncodeToString(text)}
	}
	own := &types.Process{Args: process, Env: vars, User: f.user, WorkingDir: f.dir, StopSignal: f.stopSignal}
	if cmd.Flags().Changed("entrypoint") {
		own.Entrypoint = []string{f.entrypoint}
	}
	if !proto.Equal(own, &types.Process{}) {
		spec.Process = own
	}
	return spec, check(cmd, spec)
}

// check refuses here what a host would refuse once the images are pulled.
func check(cmd *cobra.Command, spec *types.MicroVMSpec) error {
	s, err := wire.SpecFromProto(spec)
	if err == nil {
		s.Name = cmp.Or(s.Name, "made-up-later")
		s.Normalize()
		err = s.Validate()
	}
	if err != nil {
		return misused(cmd, "%w", byFlags(err))
	}
	return nil
}

// flags are a command line's words for the API's fields.
var flags = map[string]string{
	"id": "--name", "namespace": "--namespace", "vcpu": "--cpus", "memory_in_mb": "--memory", "kernel.image": "--kernel", "initrd.image": "--kernel",
	"root_volume.source.container_source": "IMAGE", "root_volume.size_in_mb": "--disk", "allowed_addresses": "--allow-address",
}

// byFlags says of mistakes in a spec which flags they are in.
func byFlags(err error) error {
	var all []error
	said := map[string]bool{}
	for _, one := range parts(err) {
		var field *vm.FieldError
		if errors.As(one, &field) {
			name, _, _ := strings.Cut(field.Field, "[")
			if flag := flags[name]; flag != "" {
				if said[flag+field.Problem] {
					continue // the kernel's image is the initrd's
				}
				said[flag+field.Problem] = true
				one = fmt.Errorf("%s: %s (%s)", flag, field.Problem, field.Field)
			}
		}
		all = append(all, one)
	}
	return errors.Join(all...)
}

// parts are the errors that errors.Join has joined.
func parts(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
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
