package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"
)

// natView is the hub's NAT as `-o json` shows it. docs/json.md describes it.
type natView struct {
	Inside     string     `json:"inside"`
	Outside    string     `json:"outside"`
	Forwarding bool       `json:"forwarding"`
	Rules      []ruleView `json:"rules"`
}

type ruleView struct {
	Rule    string `json:"rule"`
	InForce bool   `json:"in_force"`
}

func natCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "nat", Short: "Look at what lets microVMs reach the world"}
	var out *output
	list := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the hub's rules, as firewall-cmd --direct --get-all-rules does",
		Args:    cobra.NoArgs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			f, err := c.hub.Facts(cmd.Context(), &emptypb.Empty{})
			if err != nil {
				return fmt.Errorf("list NAT rules: %w", err)
			}
			n := f.GetNat()
			v := natView{n.GetInside(), n.GetOutside(), n.GetForwarding(), []ruleView{}}
			for _, r := range n.GetRules() {
				v.Rules = append(v.Rules, ruleView{r.GetRule(), r.GetPresent()})
			}
			missing := 0
			err = out.write(cmd.OutOrStdout(), v, func(w io.Writer) error {
				for _, r := range v.Rules {
					if r.InForce {
						fmt.Fprintln(w, r.Rule)
					}
				}
				return nil
			})
			for _, r := range v.Rules {
				if !r.InForce {
					missing++
					fmt.Fprintln(cmd.ErrOrStderr(), "missing:", r.Rule)
				}
			}
			if err == nil && missing > 0 {
				return exitCode(1)
			}
			return err
		}),
	}
	out = outputFlag(list)
	cmd.AddCommand(list)
	return cmd
}
