package main

import (
	"fmt"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/env"
)

func vmResizeCommand() *cobra.Command {
	var disk, volume string
	cmd := &cobra.Command{
		Use:   "resize NAME --disk SIZE",
		Short: "Make a microVM's disk larger",
		Long: `Make a microVM's disk larger, with the ext4 file system in it: of a stopped microVM, and
of a running one at its next start. A disk never shrinks. ` + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if disk == "" {
				return misused(cmd, "--disk is missing: the size that the disk shall have")
			}
			size, err := env.ParseMemory(disk)
			if err != nil {
				return misused(cmd, "--disk %s: %w", disk, err)
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				r, err := vm.host.Resize(cmd.Context(), &ingotv1.ResizeRequest{Uid: vm.uid(), VolumeId: volume, SizeInMb: int64(size)})
				if err != nil {
					return fmt.Errorf("resize %s on %s: %w", vm, vm.host.Name, err)
				}
				if r.GetMicrovm().GetStatus().GetPhase() == "running" {
					fmt.Fprintf(cmd.ErrOrStderr(), "it has the new size from its next start on: ingot vm stop %s && ingot vm start %s\n", vm, vm)
				}
				fmt.Fprintln(cmd.OutOrStdout(), vm)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&disk, "disk", "", "size of the disk: MiB, or with a unit: 512M, 4G")
	cmd.Flags().StringVar(&volume, "volume", "", "id of another volume than the root")
	return cmd
}
