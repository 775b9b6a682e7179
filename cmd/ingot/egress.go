package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/nat"
)

// egressView is what a microVM may open outside, as `-o json` shows it. docs/json.md
// describes it.
type egressView struct {
	MicroVM string   `json:"microvm"`
	UID     string   `json:"uid"`
	Rules   []string `json:"rules"` // none: everything
}

func vmEgressCommand() *cobra.Command {
	var out *output
	var reset bool
	cmd := &cobra.Command{
		Use:   "egress [NAMESPACE/]NAME [RULE…]",
		Short: "Say what a microVM may open connections to, outside; without RULE show it",
		Long: `Say what a microVM may open connections to, outside its segment, in the place of what was
said before; without RULE show it. RULE is

  allow|deny DESTINATION [SERVICE]

DESTINATION is an address, a prefix, "private" (10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16,
100.64.0.0/10, 169.254.0.0/16) or "all"; SERVICE is PORT/tcp, PORT-PORT/udp, tcp, udp or icmp. The first
that matches counts. What none matches is allowed: end with "deny all" to have it otherwise.`,
		Example: `  ingot vm egress vm-0 'deny private'
  ingot vm egress vm-0 'allow 198.51.100.0/24 443/tcp' 'deny all'
  ingot vm egress vm-0 --reset`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			rules := args[1:]
			if reset && len(rules) > 0 {
				return misused(cmd, "--reset and RULE exclude each other")
			}
			if _, err := nat.ParseEgress(rules); err != nil {
				return misused(cmd, "%w", err)
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if reset || len(rules) > 0 {
					return c.setEgress(cmd.Context(), vm, rules)
				}
				v, err := c.egress(cmd.Context(), vm)
				if err != nil {
					return err
				}
				return out.write(cmd.OutOrStdout(), v, func(w io.Writer) error {
					for _, rule := range v.Rules {
						fmt.Fprintln(w, rule)
					}
					return nil
				})
			})
		},
	}
	out = outputFlag(cmd)
	cmd.Flags().BoolVar(&reset, "reset", false, "let it open everything, as at first")
	return cmd
}

func (c *cloud) setEgress(ctx context.Context, vm microVM, rules []string) error {
	_, err := c.hub.SetEgress(ctx, &ingotv1.SetEgressRequest{Uid: vm.uid(), Rules: rules})
	return err
}

func (c *cloud) egress(ctx context.Context, vm microVM) (egressView, error) {
	v := egressView{MicroVM: vm.GetSpec().GetNamespace() + "/" + vm.GetSpec().GetId(), UID: vm.uid(), Rules: []string{}}
	r, err := c.hub.ListEgress(ctx, &ingotv1.ListEgressRequest{})
	if err != nil {
		return v, fmt.Errorf("show what %s may open: %w", vm, err)
	}
	all := r.GetEgress()
	if i := slices.IndexFunc(all, func(e *ingotv1.Egress) bool { return e.GetUid() == vm.uid() }); i >= 0 {
		v.Rules = all[i].GetRules()
	}
	return v, nil
}

// access is what a new microVM is to have of the hub.
type access struct {
	ports  []*ingotv1.Port
	egress []string
}

func (f *specFlags) access(cmd *cobra.Command) (a access, err error) {
	a.egress = f.egress
	if _, err = nat.ParseEgress(a.egress); err != nil {
		err = misused(cmd, "%w", err)
	}
	var wrong error
	a.ports, wrong = readPorts(cmd, f.publish, nat.ParsePort)
	return a, errors.Join(err, wrong)
}

// give gives it to a microVM, which is deleted again if that fails, and says where ports
// are reached. An interrupt does not reach it, as it does not reach create.
func (c *cloud) give(ctx context.Context, vm microVM, a access) (at []string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
	defer cancel()
	if len(a.egress) > 0 { // before anybody can reach it
		err = c.setEgress(ctx, vm, a.egress)
	}
	if err == nil {
		at, err = c.publish(ctx, vm, a.ports)
	}
	if err == nil {
		return at, nil
	}
	if failed := c.farewellTo(ctx, vm); failed != nil {
		err = errors.Join(err, failed)
	}
	return nil, err
}
