package main

import (
	"fmt"
	"io"
	"os"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"ingot/api/types"
)

func vmCreateCommand() *cobra.Command {
	var f specFlags
	var out *output
	cmd := &cobra.Command{
		Use:   "create IMAGE [-- COMMAND…] | create -f FILE",
		Short: "Record a microVM and return; it boots in the background",
		Long: `Record a microVM and return; it boots in the background.

FILE is a microVM as flintlock's API has it (flintlock.types.MicroVMSpec), in
YAML or JSON; - is standard input.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := createSpec(cmd, &f, args)
			if err != nil {
				return err
			}
			access, err := f.access(cmd)
			if err != nil {
				return err
			}
			return withCloud(cmd, func(c *cloud) error {
				ctx := cmd.Context()
				host, err := c.choose(ctx, f.host, spec)
				if err != nil {
					return err
				}
				if f.file == "" {
					if err := c.addKey(ctx, spec); err != nil {
						return err
					}
				}
				if err := c.publishable(ctx, access.ports); err != nil {
					return err
				}
				vm, err := c.create(ctx, host, spec)
				if err != nil {
					return err
				}
				if _, err := c.give(ctx, vm, access); err != nil {
					return err
				}
				return out.write(cmd.OutOrStdout(), view(vm, nil), func(w io.Writer) error {
					_, err := fmt.Fprintln(w, vm)
					return err
				})
			})
		},
	}
	f.register(cmd)
	out = outputFlag(cmd)
	cmd.Flags().StringVarP(&f.file, "file", "f", "", "read the microVM from a file")
	return cmd
}

// createSpec is the microVM of an image and flags, or of a file.
func createSpec(cmd *cobra.Command, f *specFlags, args []string) (*types.MicroVMSpec, error) {
	if len(args) == 0 {
		if f.file == "" {
			return nil, misused(cmd, "there is neither an IMAGE nor a --file")
		}
		return readSpec(f.file)
	}
	command, err := commandAfter(cmd, args)
	if err != nil {
		return nil, err
	}
	if f.file != "" { // known only now: flags may follow the image
		return nil, misused(cmd, "--file and IMAGE exclude each other")
	}
	return f.spec(cmd, args[0], command)
}

// readSpec reads a microVM from a file. A field that the API does not have is an error.
func readSpec(file string) (*types.MicroVMSpec, error) {
	read := func() ([]byte, error) { return os.ReadFile(file) }
	if file == "-" {
		read = func() ([]byte, error) { return io.ReadAll(os.Stdin) }
	}
	data, err := read()
	if err != nil {
		return nil, fmt.Errorf("read microVM: %w", err)
	}
	if data, err = yaml.YAMLToJSON(data); err != nil {
		return nil, fmt.Errorf("read microVM %s: %s", file, yaml.FormatError(err, false, false)) // without the file's text
	}
	spec := &types.MicroVMSpec{}
	if err := protojson.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("read microVM %s: %w", file, err)
	}
	if spec.GetNamespace() == "" {
		spec.Namespace = defaultNamespace
	}
	return spec, nil
}
