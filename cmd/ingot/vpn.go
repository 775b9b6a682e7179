package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/vpn"
)

// peerView is a device of the VPN as `-o json` shows it. docs/json.md describes it.
type peerView struct {
	Name      string     `json:"name"`
	Address   string     `json:"address"`
	PublicKey string     `json:"public_key"`
	Endpoint  string     `json:"endpoint"`  // where it was heard from last
	Handshake *time.Time `json:"handshake"` // the last one
	Received  int64      `json:"received"`  // bytes, by the hub
	Sent      int64      `json:"sent"`
	Added     *time.Time `json:"added"`
}

func vpnCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "vpn", Short: "Your devices, and their way into the environment by WireGuard"}
	cmd.AddCommand(vpnAddCommand(), vpnListCommand(), vpnRemoveCommand())
	return cmd
}

func vpnAddCommand() *cobra.Command {
	var file, public string
	var dns bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Let a device in, and print its configuration",
		Long: `Let a device in, and print the configuration that it needs: for wg-quick, or for
WireGuard's apps, which read it from the QR code that is shown on a terminal. It reaches the
microVMs, the machines and the hub. Its private key is made here, and known nowhere else:
the configuration can't be shown again.`,
		Args: cobra.ExactArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			p, err := newPeer(args[0], public)
			if err != nil {
				return err
			}
			if file != "" {
				return p.addToFile(cmd, c, file, dns)
			}
			config, err := p.add(cmd.Context(), c, dns)
			if err != nil {
				return err
			}
			if _, err := io.WriteString(cmd.OutOrStdout(), config); err != nil {
				return err
			}
			if public == "" && cmd.OutOrStdout() == os.Stdout && isTerminal(os.Stdout) {
				return writeQR(os.Stdout, config)
			}
			return nil
		}),
	}
	cmd.Flags().StringVarP(&file, "output", "o", "", "write the configuration to a file that only you can read")
	cmd.Flags().StringVar(&public, "public-key", "", "of a private key that the device has already (wg pubkey)")
	cmd.Flags().BoolVar(&dns, "dns", false, "have the device ask the hub for names: of microVMs, and all others")
	return cmd
}

// newcomer is a device that is to be let in.
type newcomer struct {
	name   string
	key    vpn.PrivateKey // zero: the device keeps it
	public vpn.Key
}

func newPeer(name, public string) (p newcomer, err error) {
	p.name = name
	if err := vpn.CheckName(name); err != nil {
		return p, err
	}
	if public != "" {
		p.public, err = vpn.ParseKey(public)
		return p, err
	}
	if p.key, err = vpn.NewPrivateKey(); err == nil {
		p.public = p.key.Public()
	}
	return p, err
}

// add has the hub let the device in, and returns its configuration.
func (p newcomer) add(ctx context.Context, c *cloud, dns bool) (string, error) {
	r, err := c.hub.AddVPNPeer(ctx, &ingotv1.AddVPNPeerRequest{Name: p.name, PublicKey: p.public.String()})
	if err != nil {
		return "", err
	}
	client := vpn.Client{Comment: fmt.Sprintf("%s, in environment %s", p.name, c.name), Key: p.key, Public: p.public, Endpoint: r.GetEndpoint()}
	client.Server, err = vpn.ParseKey(r.GetPublicKey())
	if err != nil {
		return "", fmt.Errorf("read the hub's answer: %w", err)
	}
	if client.Address, err = netip.ParseAddr(r.GetPeer().GetAddress()); err != nil {
		return "", fmt.Errorf("read the hub's answer: %w", err)
	}
	for _, text := range r.GetAllowedIps() {
		route, err := netip.ParsePrefix(text)
		if err != nil {
			return "", fmt.Errorf("read the hub's answer: %w", err)
		}
		client.Routes = append(client.Routes, route)
	}
	if dns {
		client.DNS = []string{r.GetDns(), r.GetDomain()}
	}
	return client.Config(), nil
}

// addToFile makes the file first: nobody is let in whose key is lost.
func (p newcomer) addToFile(cmd *cobra.Command, c *cloud, file string, dns bool) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("write %s: it is there already, and may have a key in it: remove it, or choose another name", file)
	}
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	config, err := p.add(cmd.Context(), c, dns)
	if err == nil {
		_, err = io.WriteString(f, config)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	path := file
	if filepath.Base(file) == file {
		path = "./" + file
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s written. Next, on the device: wg-quick up %s\n", file, path)
	return nil
}

func vpnListCommand() *cobra.Command {
	var out *output
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the devices that may come in, and when they did",
		Args:    cobra.NoArgs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			r, err := c.hub.ListVPNPeers(cmd.Context(), &ingotv1.ListVPNPeersRequest{})
			if err != nil {
				return err
			}
			views := []peerView{}
			for _, p := range r.GetPeers() {
				views = append(views, peerView{
					Name: p.GetName(), Address: p.GetAddress(), PublicKey: p.GetPublicKey(), Endpoint: p.GetEndpoint(), Handshake: when(p.GetHandshake()),
					Received: p.GetReceivedBytes(), Sent: p.GetSentBytes(), Added: when(p.GetAdded()),
				})
			}
			return out.write(cmd.OutOrStdout(), views, func(w io.Writer) error { return peerTable(w, views) })
		}),
	}
	out = outputFlag(cmd)
	return cmd
}

func peerTable(w io.Writer, views []peerView) error {
	rows := make([][]string, len(views))
	for i, v := range views {
		handshake := "never"
		if v.Handshake != nil {
			handshake = time.Since(*v.Handshake).Round(time.Second).String() + " ago"
		}
		rows[i] = []string{v.Name, v.Address, v.Endpoint, handshake, megabytes(v.Received), megabytes(v.Sent)}
	}
	return table(w, "NAME ADDRESS ENDPOINT HANDSHAKE RECEIVED SENT", rows)
}

func vpnRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "remove NAME…",
		Aliases:           []string{"rm"},
		Short:             "Cut devices off, at once",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completePeers,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			for _, name := range args {
				if _, err := c.hub.RemoveVPNPeer(cmd.Context(), &ingotv1.RemoveVPNPeerRequest{Name: name}); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), name)
			}
			return nil
		}),
	}
}

// completePeers offers the names of devices.
func completePeers(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c, err := openCloud(environment(cmd))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.close()
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	r, _ := c.hub.ListVPNPeers(ctx, &ingotv1.ListVPNPeersRequest{})
	var found []string
	for _, p := range r.GetPeers() {
		found = append(found, p.GetName())
	}
	return found, cobra.ShellCompDirectiveNoFileComp
}
