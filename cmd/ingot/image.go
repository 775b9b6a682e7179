package main

import (
	"fmt"
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
		Short: "The environment's images: in its registry, and on its hosts",
		Long: `The environment's images: in its registry, and on its hosts.

A host pulls what it needs. It deletes what no microVM on it has used for a week,
and in a nearly full pool (85 %) sooner; what a microVM uses, stopped or not, stays.`,
	}
	var r registryFlags
	r.add(cmd)
	cmd.AddCommand(imageBuildCommand(&r), imageLoadCommand(&r), imageImportCommand(&r), imagePushCommand(&r),
		imagePullCommand(), imageListCommand(&r), imageRmCommand(&r), imagePruneCommand())
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
	"debian": func(cmd *cobra.Command, o images.Options) (images.OCIImage, error) {
		return images.Debian(cmd.Context(), o)
	},
}

// builtImages are the images that an environment begins with, in the order of
// building, and allImages those that can be built.
var (
	builtImages = []string{"kernel", "busybox"}
	allImages   = append(slices.Clone(builtImages), "debian")
)

func imageBuildCommand(r *registryFlags) *cobra.Command {
	var o images.Options
	var output string
	cmd := &cobra.Command{
		Use:   "build [" + strings.Join(allImages, "|") + "]…",
		Short: "Build Ingot's own images from Debian's packages and push them",
		Long: "Build Ingot's own images from Debian's packages and push them to the environment's registry: kernel\n" +
			"and busybox, or those that are named. What has not changed makes the same image, and is not sent\n" +
			"again. debian has systemd, sshd and cloud-init, and takes minutes and mmdebstrap to build.",
		ValidArgs: allImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = builtImages
			}
			for _, name := range args {
				if !slices.Contains(allImages, name) {
					return misused(cmd, "there is no recipe for an image %q, only for %s", name, strings.Join(allImages, ", "))
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
		Short: "Push the image of a file under a name",
		Long:  "Push the image of a file (see load) under a name: also to another registry.",
		Args:  cobra.ExactArgs(2),
		RunE:  func(cmd *cobra.Command, args []string) error { return loadImages(cmd, r, args[0], args[1]) },
	}
}

const archiveForms = `FILE is what "docker save", "podman save" or "skopeo copy … oci-archive:…" wrote,
compressed or not, or a directory with an OCI image layout; - is standard input.`

func imageLoadCommand(r *registryFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "load [FILE|-] [NAME]",
		Short: "Put images from a file into the environment's registry",
		Long: "Put all images of a file into the environment's registry, under their names without\n" +
			"the registry's that they are from, or the only one under NAME.\n\n" + archiveForms,
		Example: `  docker save nginx:1.27 | ingot image load
  ingot run nginx:1.27`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = append(args, "-", "")
			if len(args) == 3 { // FILE only
				args = []string{args[0], ""}
			}
			return loadImages(cmd, r, args[0], args[1])
		},
	}
}

func imageImportCommand(r *registryFlags) *cobra.Command {
	var changes []string
	cmd := &cobra.Command{
		Use:   "import FILE|- [NAME]",
		Short: "Make an image of a root file system's tar archive",
		Long: "Make an image of a root file system's tar archive, compressed or not, and put it into the\n" +
			"environment's registry. An archive of images is loaded, see load.",
		Example: `  mmdebstrap --variant=minbase bookworm - | ingot image import - bookworm -c 'CMD ["bash"]'`,
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := images.OpenArchive(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			defer a.Close()
			name := ""
			if len(args) > 1 {
				name = args[1]
			}
			if !a.IsRootFS() {
				if len(changes) > 0 {
					return misused(cmd, "--change is for a root file system, and this is an archive of images")
				}
				return pushAll(cmd, r, a, name)
			}
			if name == "" {
				return misused(cmd, "a root file system has no name: `ingot image import %s NAME`", args[0])
			}
			img, err := a.Import(changes)
			if err != nil {
				return err
			}
			return pushImage(cmd, r, name, img)
		},
	}
	cmd.Flags().StringArrayVarP(&changes, "change", "c", nil, "a Dockerfile's line: CMD, ENTRYPOINT, ENV, USER, WORKDIR, STOPSIGNAL or LABEL")
	return cmd
}

func loadImages(cmd *cobra.Command, r *registryFlags, file, name string) error {
	a, err := images.OpenArchive(file, cmd.InOrStdin())
	if err != nil {
		return err
	}
	defer a.Close()
	return pushAll(cmd, r, a, name)
}

// pushAll pushes an archive's images, its only one under a name that is given.
func pushAll(cmd *cobra.Command, r *registryFlags, a *images.Archive, name string) error {
	list, err := a.Images()
	if err != nil {
		return err
	}
	if name != "" && len(list) > 1 {
		return misused(cmd, "there are %d images, and one name", len(list))
	}
	for _, n := range list {
		as := name
		switch {
		case as == "" && n.Name == "":
			return misused(cmd, "the image has no name: give it one after the file")
		case as == "":
			if as, err = images.ShortName(n.Name); err != nil {
				return err
			}
		}
		if err := pushImage(cmd, r, as, n.Image); err != nil {
			return err
		}
	}
	return nil
}
