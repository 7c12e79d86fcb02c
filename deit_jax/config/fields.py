"""Defines every field of a config, with its meaning and its value for DeiT-B.

A config holds choices only. Numbers that follow from them, such as warm-up steps, are computed
after the command line is parsed (`plan.plan_run`), so no override leaves an old one behind.
"""

from ml_collections import ConfigDict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# `init_from` of recipes that fine-tune, until the command line names a folder.
PRETRAINED = "PRETRAINED_MODEL_FOLDER"


def default_config() -> ConfigDict:
    """Returns the recipe of DeiT-B on ImageNet-1k, 300 epochs; other recipes change it."""
    config = ConfigDict()

    # Model or run folder to start from ("": from scratch). A checkpoint in the workdir wins.
    # Image size, classes and distillation token may differ; in evaluation, the image size alone.
    config.init_from = ""

    config.model = ConfigDict()
    config.model.name = "deit_base_patch16_224"  # see deit_jax.list_models(); "": as in init_from
    config.model.patch_size = 0  # 0: the model's own
    # Structural options in place of the model's, for instance "rope=mixed num_registers=4".
    config.model.options = ""
    # Stochastic depth: rises to this over the blocks of DeiT, equal in all blocks of DeiT III.
    config.model.drop_path_rate = 0.1
    # auto (pallas on TPUs, xla elsewhere) | xla | xla_remat (stores no attention weights: less
    # memory, a little more time) | pallas (kernels for TPUs) | cudnn (for GPUs from Hopper on;
    # its gradients do not repeat to the bit)
    config.model.attention = "auto"
    config.model.remat = False  # recompute blocks in the backward pass: less memory, more time

    config.dataset = ConfigDict()
    config.dataset.source = "tfds"  # tfds | folder | digits | hf (Hugging Face)
    # tfds: name or name:version; hf: OWNER/NAME or OWNER/NAME:CONFIG, "" where root is a folder.
    config.dataset.name = "imagenet2012"
    # tfds: data_dir ("": TFDS's default); folder: where the splits are; hf: Parquet files.
    config.dataset.root = ""
    config.dataset.train_split = "train"  # tfds, hf: also "train[:90%]"
    # folder: where it is missing, val, valid, validation and test are tried.
    config.dataset.eval_split = "validation"
    # folder: where the root holds classes and no splits, the part of each class that is held out
    # for evaluation, fixed by a seed of its own; 0: refuse to split.
    config.dataset.eval_fraction = 0.1
    config.dataset.label_file = ""  # folder: file of "name,label" rows, without class folders
    config.dataset.num_classes = 0  # 0: as found in the data
    config.dataset.train_fraction = 1.0  # train on a fixed, stratified part of the train split

    config.input = ConfigDict()  # on the host, in uint8
    config.input.image_size = 224  # 0: as in init_from
    # random_resized | simple_random (DeiT III: resizes the short side, pads by reflection, crops) |
    # small (resizes the whole image, pads with zeros, crops; evaluation does not crop)
    config.input.train_crop = "random_resized"
    config.input.scale = (0.08, 1.0)  # random_resized: area of the crop
    config.input.ratio = (3 / 4, 4 / 3)  # random_resized: aspect of the crop
    config.input.pad = 4  # simple_random and small: pixels of padding on each side
    config.input.hflip = 0.5  # probability
    config.input.auto_augment = "rand-m9-mstd0.5-inc1"  # RandAugment, as timm writes it; "": none
    config.input.three_augment = False  # DeiT III: one of grey, solarise, blur; no auto_augment
    # Factors of brightness, contrast and saturation are drawn from [1 - this, 1 + this].
    config.input.color_jitter = 0.0
    config.input.repeats = 3  # repeated augmentation: views of each drawn image in an epoch
    # error | skip (takes the next readable image). With error and one view of each image, and in
    # evaluation, a JPEG is decoded only down to the end of its crop: damage below goes unnoticed.
    config.input.on_bad_image = "error"
    # Reads at a time, ahead of decoding, where storage lets a read wait (a network file system).
    # 0: in a bucket 40 a processor; on a disk an image is read where it is decoded.
    config.input.read_threads = 0
    config.input.interpolation = "bicubic"  # bicubic | bilinear
    config.input.crop_ratio = 0.875  # evaluation: centre crop / resized short side
    config.input.mean = IMAGENET_MEAN
    config.input.std = IMAGENET_STD

    config.mixing = ConfigDict()  # on the device, in float32
    config.mixing.random_erasing = 0.25  # probability per image
    config.mixing.mixup_alpha = 0.8  # 0: off
    config.mixing.cutmix_alpha = 1.0  # 0: off
    config.mixing.prob = 1.0  # probability that a group is mixed at all
    config.mixing.switch_prob = 0.5  # probability of cutmix where both are on
    config.mixing.smoothing = 0.1  # label smoothing
    # Images that share one draw: the published run's images per GPU (64 for B, 256 for Ti and S).
    config.mixing.group_size = 64

    config.distill = ConfigDict()
    # none | hard | soft. With none, both heads of a distilled model learn from the labels.
    config.distill.kind = "none"
    config.distill.alpha = 0.5  # weight of the teacher's term
    # True: a model without distillation token learns from labels and teacher by its class head.
    config.distill.class_head = False
    config.distill.temperature = 1.0  # soft only
    config.distill.reduction = "numel"  # soft only: numel (reference: mean over B·K) | batchmean
    config.distill.teacher = ""  # model folder or run folder that exists; "": WORKDIR/teacher
    # Recipe that trains the teacher in WORKDIR/teacher where there is none. It takes from the
    # student: dataset, parallel, checkpoint and distributed; of input image_size, interpolation,
    # mean, std and on_bad_image; of train batch_size, dtype, seed, tensorboard and wandb.
    config.distill.teacher_config = ""
    config.distill.teacher_epochs = 0  # 0: as that recipe says

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | lamb | sgd (with Nesterov momentum)
    # Effective peak rate. The reference scales: 5e-4 · global batch / 512 = 1e-3 at 1024.
    config.optimizer.lr = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.b1 = 0.9  # b1, b2 and eps: adamw and lamb
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.9  # sgd
    config.optimizer.clip_norm = 0.0  # of the gradient over all parameters; 0: none (DeiT)
    config.optimizer.decay_dist_token = True  # the reference decays it; timm does not
    # Regular expressions, separated by spaces, for the full names of the parameters to train ("":
    # all); the others stay frozen, but not the statistics of BatchNorm. Attention alone, as in
    # "Three things everyone should know about vision transformers": ".*/attn/.* head/.* pos_embed".
    config.optimizer.trainable = ""

    config.schedule = ConfigDict()
    config.schedule.epochs = 300
    config.schedule.warmup_epochs = 5  # at most half of the epochs
    config.schedule.warmup_lr = 1e-6
    config.schedule.min_lr = 1e-5
    # True: constant within an epoch and one epoch late, as published. False: smooth, no lag.
    config.schedule.per_epoch = True

    config.train = ConfigDict()
    config.train.batch_size = 1024  # global, over all devices of all hosts
    # Micro-batches that a batch is split into for its gradient: less memory, the same update.
    # Mixing comes first, so its groups stay whole; stochastic depth is drawn for each micro-batch,
    # and BatchNorm (RegNetY) uses the statistics of each.
    config.train.accumulate_steps = 1
    config.train.seed = 0
    # Of the class head; without a teacher, of the mean of all heads. bce (DeiT III): a binary
    # question per class, where mixed images belong to both of their classes. Evaluation always
    # reports the cross-entropy.
    config.train.loss = "cross_entropy"  # cross_entropy | bce
    # Co-training of submodels (arXiv 2212.04884): each image passes through two, which stochastic
    # depth draws; they learn from the labels and from each other. Always binary per class; `loss`
    # only decides whether a mixed image belongs to both classes in full (bce) or in part.
    config.train.cosub = False
    # Of the matmuls. float32 is full precision also on accelerators; float32_fast lets them choose:
    # bfloat16 on TPUs, TF32 on GPUs.
    config.train.dtype = "bfloat16"  # bfloat16 | float32 | float32_fast
    config.train.ema_decay = 0.99996  # 0: no EMA
    config.train.log_every_steps = 50
    # Adds attention_max to the train metrics: the largest attention logit of the last batch. Costs
    # one more forward pass per log line.
    config.train.log_attention = False
    config.train.eval_every_epochs = 1  # 0: only at the end
    # Pairs (epochs, top-1 in percent) of the published run; an evaluation well below it warns.
    config.train.expected_top1 = ()
    config.train.max_nonfinite_steps = 10  # in a row, before the run stops
    # Also write TensorBoard events (extra: tensorboard), with the config and, of runs in one
    # process, the first batch as the model sees it and images with what it takes them for.
    config.train.tensorboard = False
    config.train.wandb = ""  # the same for Weights & Biases (extra: wandb): the project; "": off

    config.parallel = ConfigDict()
    # jit: one program over all devices; pmap: one program per device. Results agree.
    config.parallel.backend = "jit"  # jit | pmap (fsdp 1 only)
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1  # 0: only at the end
    config.checkpoint.every_steps = 0  # additionally, every so many steps; 0: off
    config.checkpoint.keep = 2  # latest ones; the best one is kept besides
    # Names, separated by spaces, of what may differ from the checkpoint where a run goes on:
    # train.batch_size train.seed input.repeats mixing.group_size steps_per_epoch data
    # schedule.epochs (more of them are always accepted).
    config.checkpoint.accept_changes = ""

    # Several processes. Cloud TPU slices, Slurm steps, Open MPI 4 and indexed Kubernetes jobs are
    # detected; the fields below take precedence, and are needed elsewhere.
    config.distributed = ConfigDict()
    config.distributed.auto = True  # False: detect nothing
    config.distributed.coordinator_address = ""  # host:port of process 0
    config.distributed.num_processes = 1
    config.distributed.process_id = 0
    config.distributed.start_timeout = 300  # seconds to wait for the others while starting
    return config
