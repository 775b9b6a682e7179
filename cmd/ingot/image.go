package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ingot/guest"
	images "ingot/internal/image/build"
)

func imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build, push and list the environment's images",
	}
	var r registryFlags
	r.add(cmd)
	cmd.AddCommand(imageBuildCommand(&r), imageListCommand(&r), imagePushCommand(&r))
	return cmd
}

// registryFlags say which registry: the environment's, or another.
type registryFlags struct {
	address string
	caFile  string
	user    string
}

func (f *registryFlags) add(cmd *cobra.Command) {
	flags := cmd.PersistentFlags()
	flags.StringVar(&f.address, "registry", "", "another registry, host:port (its password: INGOT_REGISTRY_PASSWORD)")
	flags.StringVar(&f.caFile, "registry-ca", "", "that registry's CA, a PEM file; empty: the machine's")
	flags.StringVar(&f.user, "registry-user", "", "that registry's user; empty: none")
}

func (f *registryFlags) open(cmd *cobra.Command) (images.Registry, error) {
	if f.address != "" {
		return images.Registry{Address: f.address, CAFile: f.caFile, User: f.user, Password: os.Getenv("INGOT_REGISTRY_PASSWORD")}, nil
	}
	return environmentRegistry(environment(cmd))
}

// builders are the images that can be built.
var builders = map[string]func(*cobra.Command, images.Options) (images.OCIImage, error){
	"kernel": func(cmd *cobra.Command, o images.Options) (images.OCIImage, error) {
		init, err := guest.Init()
		if err != nil {
			return nil, err
		}
		return images.Kernel(cmd.Context(), o, init)
	},
	"busybox": func(cmd *cobra.Command, o images.Options) (images.OCIImage, error) {
		return images.Busybox(cmd.Context(), o)
	},
}

// builtImages are the images in the order of building.
var builtImages = []string{"kernel", "busybox"}

func imageBuildCommand(r *registryFlags) *cobra.Command {
	var o images.Options
	var output string
	cmd := &cobra.Command{
		Use:   "build [" + strings.Join(builtImages, "|") + "]…",
		Short: "Build Ingot's own images from Debian's packages and push them",
		Long: "Build Ingot's own images from Debian's packages and push them to the environment's registry: all,\n" +
			"or those that are named. What has not changed makes the same image, and is not sent again.",
		ValidArgs: builtImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = builtImages
			}
			for _, name := range args {
				if !slices.Contains(builtImages, name) {
					return misused(cmd, "there is no recipe for an image %q, only for %s", name, strings.Join(builtImages, ", "))
				}
			}
			o.Progress = func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), s) }
			for _, name := range args {
				img, err := builders[name](cmd, o)
				if err != nil {
					return err
				}
				if output != "" {
					file := filepath.Join(output, name+".tar")
					if err := images.Save(file, name, img); err != nil {
						return err
					}
					fmt.Fprintln(cmd.OutOrStdout(), file)
					continue
				}
				if err := pushImage(cmd, r, name, img); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.Cache, "cache", images.DefaultCache, "directory that packages are kept in")
	cmd.Flags().StringVar(&output, "save", "", "write NAME.tar files to this directory instead of pushing")
	return cmd
}

func pushImage(cmd *cobra.Command, r *registryFlags, name string, img images.OCIImage) error {
	registry, err := r.open(cmd)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "push %s to %s\n", name, registry.Address)
	digest, err := images.Push(cmd.Context(), registry, name, img)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s@%s\n", name, digest)
	return nil
}

func imagePushCommand(r *registryFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "push FILE NAME",
		Short: "Push an image from a file (docker save) or a directory (OCI layout)",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			img, err := images.Load(args[0])
			if err != nil {
				return err
			}
			return pushImage(cmd, r, args[1], img)
		},
	}
}

// imageRow is an image as -o json shows it. docs/json.md describes it.
type imageRow struct {
	Name    string `json:"name"`
	Digest  string `json:"digest"`
	Size    int64  `json:"size"`
	Version string `json:"version"`
}

func imageListCommand(r *registryFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the images of the environment's registry",
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
			rows = append(rows, imageRow{i.Name, i.Digest, i.Size, i.Labels[images.LabelVersion]})
		}
		return o.write(cmd.OutOrStdout(), rows, func(w io.Writer) error { return imageTable(w, rows) })
	}
	return cmd
}

func imageTable(w io.Writer, rows []imageRow) error {
	var cells [][]string
	for _, r := range rows {
		digest := r.Digest
		if len(digest) > 19 {
			digest = digest[:19]
		}
		cells = append(cells, []string{r.Name, r.Version, fmt.Sprintf("%.1fMB", float64(r.Size)/1e6), digest})
	}
	return table(w, "NAME VERSION SIZE DIGEST", cells)
}
