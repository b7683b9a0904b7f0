package main

import "github.com/deimos-edge/deimos/packaging/init/gpt"

const (
	sector    = gpt.Block
	alignment = 2048 // sectors: 1 MiB, where partitions begin
)

// The same in every image, so that two builds are equal. They were drawn at random once.
var (
	diskGUID = gpt.GUID{0x5a, 0x1d, 0xfd, 0x6b, 0x2c, 0x1d, 0x66, 0x4b, 0x9e, 0x0c, 0x5c, 0x2f, 0x1a, 0x7d, 0x3e, 0x84}
	espGUID  = gpt.GUID{0x19, 0x7c, 0x4f, 0x2e, 0xd3, 0x86, 0x0a, 0x4f, 0xb1, 0x57, 0x3d, 0x90, 0xc6, 0xe8, 0xa2, 0xf5}
)

// writeGPT writes the partition tables of a disk of so many sectors, and the MBR
// that protects them. The EFI system partition is from first to last, both included.
func writeGPT(d gpt.Disk, sectors, first, last int64) error {
	table := gpt.New(diskGUID)
	if _, err := table.Add(gpt.Partition{Type: gpt.EFISystem, ID: espGUID, First: first, Last: last, Name: "deimos-esp"}); err != nil {
		return err
	}
	if _, err := d.WriteAt(gpt.ProtectiveMBR(sectors*sector), 0); err != nil {
		return err
	}
	return table.Write(d, sectors*sector)
}
