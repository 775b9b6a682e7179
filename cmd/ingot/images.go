package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	ingotv1 "ingot/api/ingot/v1"
	images "ingot/internal/image/build"
)

// imageRow is an image as -o json shows it. docs/json.md describes it.
type imageRow struct {
	Name     string      `json:"name"`
	Digest   string      `json:"digest"`
	Size     int64       `json:"size"`
	Version  string      `json:"version"`
	Registry bool        `json:"registry"`
	Hosts    []imageHost `json:"hosts"`
}

// imageHost is a host that has the image.
type imageHost struct {
	Name     string     `json:"name"`
	MicroVMs []string   `json:"microvms"`
	Used     *time.Time `json:"used"`
}

func imageListCommand(r *registryFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the images of the registry and of the hosts",
		Args:  cobra.NoArgs,
	}
	o := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		registry, err := r.open(cmd)
		if err != nil {
			return err
		}
		list, err := images.List(cmd.Context(), registry)
		if err != nil {
			return err
		}
		rows := []imageRow{}
		for _, i := range list {
			rows = append(rows, imageRow{i.Name, i.Digest, i.Size, i.Labels[images.LabelVersion], true, []imageHost{}})
		}
		if r.address == "" { // another registry has nothing to do with the hosts
			err = withCloud(cmd, func(c *cloud) error {
				rows = c.addHeld(cmd.Context(), rows, registry.Address)
				return nil
			})
		}
		if err != nil {
			return err
		}
		return o.write(cmd.OutOrStdout(), rows, func(w io.Writer) error { return imageTable(w, rows) })
	}
	return cmd
}

// addHeld adds what the hosts have. A host's image that the registry has too, as
// it is, is one row with that.
func (c *cloud) addHeld(ctx context.Context, rows []imageRow, registry string) []imageRow {
	var mu sync.Mutex
	err := c.on(c.hosts, func(h *hostClient) error {
		r, err := h.ListImages(ctx, &ingotv1.ListImagesRequest{})
		if err != nil {
			return fmt.Errorf("list images: %w", err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, i := range r.GetImages() {
			name := strings.TrimPrefix(i.GetName(), registry+"/")
			at := slices.IndexFunc(rows, func(r imageRow) bool { return r.Name == name && r.Digest == i.GetDigest() })
			if at < 0 {
				at = len(rows)
				rows = append(rows, imageRow{Name: name, Digest: i.GetDigest(), Size: i.GetSizeBytes(), Hosts: []imageHost{}})
			}
			rows[at].Hosts = append(rows[at].Hosts, imageHost{h.Name, append([]string{}, i.GetMicrovmUids()...), when(i.GetUsedAt())})
		}
		return nil
	})
	if err != nil { // the registry's images are worth showing without the hosts
		fmt.Fprintln(os.Stderr, "ingot:", explain(err, c.name))
	}
	for _, r := range rows {
		slices.SortFunc(r.Hosts, func(a, b imageHost) int { return strings.Compare(a.Name, b.Name) })
	}
	slices.SortStableFunc(rows, func(a, b imageRow) int { return strings.Compare(a.Name, b.Name) })
	return rows
}

func imageTable(w io.Writer, rows []imageRow) error {
	var cells [][]string
	for _, r := range rows {
		digest := r.Digest
		if len(digest) > 19 {
			digest = digest[:19]
		}
		registry, users := "-", 0
		if r.Registry {
			registry = "yes"
		}
		var hosts []string
		for _, h := range r.Hosts {
			hosts = append(hosts, h.Name)
			users += len(h.MicroVMs)
		}
		cells = append(cells, []string{
			r.Name, cmp.Or(r.Version, "-"), megabytes(r.Size), digest, registry,
			cmp.Or(strings.Join(hosts, ","), "-"), fmt.Sprint(users),
		})
	}
	return table(w, "NAME VERSION SIZE DIGEST REGISTRY HOSTS MICROVMS", cells)
}

func megabytes(n int64) string { return fmt.Sprintf("%.1fMB", float64(n)/1e6) }

func imagePullCommand() *cobra.Command {
	var hosts []string
	var policy string
	cmd := &cobra.Command{
		Use:   "pull IMAGE…",
		Short: "Have the hosts pull images ahead of use",
		Args:  cobra.MinimumNArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			on := c.hosts
			if len(hosts) > 0 {
				on = nil
				for _, name := range hosts {
					h, err := c.host(name)
					if err != nil {
						return err
					}
					on = append(on, h)
				}
			}
			if err := checkPolicy(cmd, policy); err != nil {
				return err
			}
			p := newProgress()
			defer p.clear()
			return c.on(on, func(h *hostClient) error { return pullAll(cmd.Context(), h, p, policy, args) })
		}),
	}
	cmd.Flags().StringArrayVar(&hosts, "host", nil, "only on this host (may be repeated; default: on all)")
	pullFlag(cmd, &policy)
	return cmd
}

// pullPolicies are the values of --pull.
var pullPolicies = []string{"always", "missing", "never"}

func pullFlag(cmd *cobra.Command, policy *string) {
	cmd.Flags().StringVar(policy, "pull", "", "ask the registry for the image: always, if it is missing, never (default: always for the tag latest, else missing)")
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions(pullPolicies, cobra.ShellCompDirectiveNoFileComp))
}

func checkPolicy(cmd *cobra.Command, policy string) error {
	if policy != "" && !slices.Contains(pullPolicies, policy) {
		return misused(cmd, "--pull %s: it must be one of %s", policy, strings.Join(pullPolicies, ", "))
	}
	return nil
}

// pullAll has a host pull images, at the same time, and shows how far it is.
func pullAll(ctx context.Context, host *hostClient, p *progress, policy string, list []string) error {
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, image := range list {
		wg.Go(func() {
			stream, err := host.Pull(ctx, &ingotv1.PullRequest{Image: image, Policy: policy})
			for err == nil {
				var r *ingotv1.PullResponse
				if r, err = stream.Recv(); err == nil {
					p.say(strings.TrimSpace("pull "+image+" "+unpacking(r)), transferred(r.GetOffset(), r.GetTotal()))
				}
			}
			if errors.Is(err, io.EOF) {
				return
			}
			errs[i] = fmt.Errorf("pull %s on %s: %w", image, host.Name, err)
			if gone(err) && slices.Contains(allImages, image) {
				errs[i] = fmt.Errorf("%w (`ingot image build %s` makes it)", errs[i], image)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// unpacking says what a pull does that does not come over the network any more.
func unpacking(r *ingotv1.PullResponse) string {
	if r.GetStatus() == "unpack" {
		return "(unpack)"
	}
	return ""
}

func imageRmCommand(r *registryFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME…",
		Short: "Delete images from the registry and from the hosts",
		Long:  "Delete images from the registry and from the hosts, unless a microVM uses them: all or none.",
		Args:  cobra.MinimumNArgs(1),
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, args []string) error {
			registry, err := r.open(cmd)
			if err != nil {
				return err
			}
			var names []string
			for _, a := range args {
				name, err := images.FullName(registry, a)
				if err != nil {
					return misused(cmd, "%w", err)
				}
				names = append(names, name)
			}
			here, err := c.holders(cmd.Context(), names)
			if err != nil {
				return err
			}
			for i, name := range names {
				found := len(here[name]) > 0
				if strings.HasPrefix(name, registry.Address+"/") { // another's registry is not ours to tidy
					err := images.Delete(cmd.Context(), registry, name)
					if err != nil && !errdefs.IsNotFound(err) {
						return err
					}
					found = found || err == nil
				}
				for _, h := range here[name] {
					_, err := h.RemoveImages(cmd.Context(), &ingotv1.RemoveImagesRequest{Images: []string{name}})
					if err != nil && status.Code(err) != codes.NotFound {
						return fmt.Errorf("delete %s on %s: %w", args[i], h.Name, err)
					}
				}
				if !found {
					return fmt.Errorf("delete %s: %w; `ingot image list` shows what there is", args[i], errdefs.ErrNotFound)
				}
				fmt.Fprintln(cmd.OutOrStdout(), args[i])
			}
			return nil
		}),
	}
}

// holders are the hosts that have images; one that a microVM uses is an error.
func (c *cloud) holders(ctx context.Context, names []string) (map[string][]*hostClient, error) {
	var mu sync.Mutex
	here := map[string][]*hostClient{}
	err := c.on(c.hosts, func(h *hostClient) error {
		r, err := h.ListImages(ctx, &ingotv1.ListImagesRequest{})
		if err != nil {
			return fmt.Errorf("list images: %w", err)
		}
		var used []error
		for _, i := range r.GetImages() {
			if !slices.Contains(names, i.GetName()) {
				continue
			}
			if users := i.GetMicrovmUids(); len(users) > 0 {
				used = append(used, fmt.Errorf("image %s is used by %s: %w", i.GetName(), strings.Join(users, ", "), errdefs.ErrFailedPrecondition))
			}
			mu.Lock()
			here[i.GetName()] = append(here[i.GetName()], h)
			mu.Unlock()
		}
		return errors.Join(used...)
	})
	return here, err
}

func imagePruneCommand() *cobra.Command {
	var unused time.Duration
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Delete from the hosts the images that no microVM uses",
		Long:  "Delete from the hosts the images that no microVM uses. The registry keeps them: the next use pulls them again.",
		Args:  cobra.NoArgs,
		RunE: inCloud(func(cmd *cobra.Command, c *cloud, _ []string) error {
			var mu sync.Mutex
			var freed int64
			err := c.on(c.hosts, func(h *hostClient) error {
				r, err := h.RemoveImages(cmd.Context(), &ingotv1.RemoveImagesRequest{UnusedFor: durationpb.New(unused)})
				if err != nil {
					return fmt.Errorf("delete unused images: %w", err)
				}
				mu.Lock()
				defer mu.Unlock()
				for _, i := range r.GetImages() {
					fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", h.Name, i.GetName())
				}
				freed += r.GetFreedBytes()
				return nil
			})
			fmt.Fprintf(cmd.ErrOrStderr(), "freed %s, and what they took unpacked\n", megabytes(freed))
			return err
		}),
	}
	cmd.Flags().DurationVar(&unused, "unused", 0, "only what was not used for so long: 24h")
	return cmd
}
